"""Which part of the recipe does what: variants x bit-widths x seeds on the tiny pipeline.

    python main.py --job study --config configs/study_tiny.py --workdir studies/recipe
    python main.py --job study --config configs/study_tiny.py:finals --workdir studies/recipe
    python main.py --job study --config configs/study_tiny.py:finals,gpu --workdir studies/recipe

Screening: every variant once at W4A4 and W3A3, measured on held-out distillation loss and drift.
Finals: the 8 best and their references, three seeds each, judged on 512 pairs of videos; of those
that the screening cannot rank, one seed.
Records of finished cells are in the workdir and tracked; the same command runs the missing ones.
Clips are drawn and encoded at the first start.

Two CPU cores without AVX-512: a step at batch 8 takes 0.46 s with the branch and 0.32 without in
each of two processes with a core of its own. A variant's first cell compiles for 80 s of one core,
its next bit-width reads that from the cache. docs/study.md says what the whole took.
"""

from importlib.metadata import version

from ml_collections import ConfigDict

from configs import tiny_w4a4
from configs._recipes import overrides

# Programs compile in two thirds of the time and are no slower (CPU). JAX 0.11 ends over the first.
QUICK_TO_COMPILE = "--xla_backend_optimization_level=1"
if version("jax").startswith("0.10."):
    QUICK_TO_COMPILE = f"--xla_cpu_use_fusion_emitters=false {QUICK_TO_COMPILE}"

_WEIGHTS_RATE = tiny_w4a4.get_config("full").train.learning_rate.weights
_SCREENING = {
    # The defaults as they were, see `common`.
    "default": {"train.log_spectrum": True},
    "released": overrides("released", _WEIGHTS_RATE),
    # No low-rank branch at all (QVGen, arXiv 2505.11497, the ablation without Phi).
    "plain_qat": {"quant.rank": 0},
    # The same for as many operations as the default takes, in more steps.
    "plain_qat_equal_ops": {"quant.rank": 0, "train.steps": "equal_operations"},
    # The rank that Phi starts with (QVGen, its ablation of r).
    "rank_8": {"quant.rank": 8},
    "rank_16": {"quant.rank": 16},
    "rank_64": {"quant.rank": 64},
    # As many columns as the hidden size, whole to the end: QVGen's figure of singular values.
    "full_rank_kept": {
        "quant.rank": 128,
        "quant.decay_shape": "abrupt",
        "quant.decay_fraction": 1.0,
        "train.log_spectrum": True,
    },
    # Three quarters leave per phase instead of half (QVGen, lambda = 1/4).
    "shrink_4": {"quant.shrink": 4},
    # The way from 1 to 0 within a phase (QVGen, its ablation of the annealing function).
    "linear_decay": {"quant.decay_shape": "linear"},
    # The important directions leave first: what the order is worth (ours).
    "largest_first": {"quant.decay_order": "largest"},
    # When Phi is gone; QVGen decays to the last step, 1.0.
    "decay_end_30": {"quant.decay_fraction": 0.3},
    "decay_end_70": {"quant.decay_fraction": 0.7},
    "decay_end_85": {"quant.decay_fraction": 0.85},
    "decay_end_100": {"quant.decay_fraction": 1.0},
    # No new SVD at a boundary: columns leave in the order of step 0 (ours). Those that live keep
    # their moments, as nothing turns: its counterpart is moments_rotate, since the default also
    # resets them.
    "no_refactor": {"quant.refactor": False},
    # Adam's moments of L and R over a refactoring: as they are (the release), or rotated with it.
    "moments_keep": {"quant.branch_moments": "keep"},
    "moments_rotate": {"quant.branch_moments": "rotate"},
    # A level rate once the branch is gone, instead of the end of a cosine (ours).
    "constant_tail": {"train.schedule": "constant_tail"},
    # The true velocity blended into the target, by timestep (the blend l(t) with a = 5).
    "truth_blend_5": {"train.truth_blend": 5.0},
    # The timestep's own linears in full precision, exported as a table (DSAQuant, 2609.04031).
    "time_table": {"quant.time_table": True},
    # No zero points of weights (QuaRot, arXiv 2404.00456; DSAQuant).
    "symmetric_weights": {"quant.symmetric_weights": True},
    # A token's range as its values are, zero outside or not (the release).
    "activations_without_zero": {"quant.include_zero": "no"},
    # Rotated activations (QuaRot), balanced channels (SmoothQuant, arXiv 2211.10438), and both.
    "hadamard": {"quant.rotation": "hadamard"},
    "smoothing_05": {"quant.smoothing": 0.5},
    "hadamard_smoothing": {"quant.rotation": "hadamard", "quant.smoothing": 0.5},
    # Noise levels in training as in sampling (the pipeline's flow_shift).
    "inference_shift": {"train.shift": 3.0},
    # Averaged weights once the branch is gone (Polyak and Juditsky; as diffusion models ship).
    "ema_099": {"train.ema_decay": 0.99},
    # The whole branch at once, late (QVGen, the ablation without decay).
    "abrupt_end": {"quant.decay_shape": "abrupt", "quant.decay_fraction": 0.9},
}
_TOGETHER = {"quant.rotation": "hadamard", "quant.smoothing": 0.5, "quant.time_table": True}
_FINALS_ONLY = {
    # The last 4 of 25 steps without guidance, which amplifies errors (arXiv 2404.07724). It trains
    # as the default does: only videos can tell.
    "unguided_last": {"sample.unguided_steps": 4},
    # What the screening found best, all at once; and the same without the branch, in as many
    # operations: whether Phi adds anything to them (ours).
    "together": _TOGETHER,
    "together_plain": {**_TOGETHER, "quant.rank": 0, "train.steps": "equal_operations"},
    # The trained baselines of QVGen's paper, as configs/_recipes.py has them; its plain training
    # is plain_qat above.
    **{name: overrides(name, _WEIGHTS_RATE) for name in ("lsq", "q_dm", "efficient_dm")},
}
# In the finals beside the 8 best, only because no held-out loss can rank them.
_ONE_SEED = ("truth_blend_5", "unguided_last")
# Cells at once, each on its share of the CPUs, and what every cell's process is started with.
_PLACES = {
    "cpu": (2, {"XLA_FLAGS": QUICK_TO_COMPILE}),
    # One GPU for all cells: a tiny model leaves it idle. Float32 is multiplied as such, as on a
    # CPU. Runs diverged there at the first halving; what mended it, if it did, has not run on one
    # (docs/gpu.md): see the losses before you believe the tables.
    "gpu": (
        16,
        {
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "JAX_DEFAULT_MATMUL_PRECISION": "highest",
        },
    ),
}


def get_config(arg: str = "screening") -> ConfigDict:
    """`arg`: "screening", "finals", or "smoke" for a few steps of two variants; with ",gpu" the
    cells share a GPU."""
    stage, _, place = (arg or "screening").partition(",")
    place = place or "cpu"
    if stage not in ("screening", "finals", "smoke"):
        raise ValueError(f"study_tiny knows 'screening', 'finals' and 'smoke', not {stage!r}")
    if place not in _PLACES:
        raise ValueError(f"study_tiny runs on 'cpu' or 'gpu', not {place!r}")
    finals, smoke = stage == "finals", stage == "smoke"

    config = ConfigDict(convert_dict=False)  # Dotted keys are no keys of a ConfigDict.
    config.stage = stage
    config.base = "configs/tiny_w4a4.py" if smoke else "configs/tiny_w4a4.py:full"
    config.bits = ((4, 4),) if smoke else ((4, 4), (3, 3))
    config.seeds = (0,)
    # The spread of runs that differ in nothing but luck.
    config.more_seeds = {"default": (1, 2)} if stage == "screening" else {}
    if finals:
        all_variants = (*_SCREENING, *_FINALS_ONLY)
        config.more_seeds = {name: (1, 2) for name in all_variants if name not in _ONE_SEED}
    config.parallel, config.environment = _PLACES[place]

    config.variants = _SCREENING | (_FINALS_ONLY if finals else {})
    if smoke:
        config.variants = {name: _SCREENING[name] for name in ("default", "plain_qat")}
    # Of the earlier `grid` (an empty one runs all variants) the `best` by held-out loss, beside
    # `always`; or `names`, where they are chosen by hand. `without`: variants that the choice need
    # not wait for.
    config.finalists = ConfigDict(convert_dict=False)
    config.finalists.grid = get_config("screening").to_dict() if finals else {}
    config.finalists.best = 8
    # References, and what the held-out distillation loss cannot rank: truth_blend_5 gives up part
    # of that very loss for the truth, unguided_last trains as the default, and plain training at
    # equal cost is the control that a claim for the branch needs, wherever it stands.
    config.finalists.always = (
        "default",
        "released",
        "plain_qat",
        "plain_qat_equal_ops",
        "truth_blend_5",
        "unguided_last",
        "together",
        "together_plain",
        "lsq",
        "q_dm",
        "efficient_dm",
    )
    config.finalists.names = ()
    config.finalists.without = tuple(_FINALS_ONLY)

    # The default since: the finals' tables compare every other variant with it too.
    config.recipe = "" if smoke else "hadamard_smoothing"

    steps = {"screening": 300, "finals": 400, "smoke": 6}[stage]
    config.common = {
        # What the defaults were when the study began: its variant "default".
        "quant.rotation": "none",
        "quant.smoothing": 0.0,
        "train.steps": steps,
        "train.warmup_steps": steps // 20,
        "train.batch_size": 2 if smoke else 8,
        "train.remat": "none",  # Activations are small here: no need to compute them twice.
        "quant.product_dtype": "float32",  # As exact as the others for codes, and faster here.
        "train.log_every": 1 if smoke else 4,
        "train.log_spectrum": False,  # Only where a figure needs it.
        "train.checkpoint_every": max(steps // 3, 1),
        "train.keep_checkpoints": 1,
        "sample.count": 0,  # No videos to look at.
        "evaluate.round_to_nearest": False,
        "evaluate.videos": 512 if finals else 0,
        "evaluate.shown": 0,
        "evaluate.pixels": False,
        "evaluate.drift_videos": 2 if smoke else 32,
        "evaluate.held_out": "assets/clips" if smoke else "data/moving_shapes_heldout_64",
        "evaluate.held_out_encoded": (
            "runs/study/smoke_encoded" if smoke else "data/moving_shapes_heldout_64_encoded"
        ),
        "evaluate.reference": "runs/study/reference",
    }
    if smoke:
        config.common |= {"data.encoded": "runs/study/smoke_encoded", "quant.rank": 2}
    # Drawn if they are missing: folder -> arguments of data/moving_shapes.py.
    config.clips = {
        "data/moving_shapes_1024": {"count": 1024, "seed": 1},
        "data/moving_shapes_heldout_64": {"count": 64, "seed": 2, "split": "heldout"},
    }
    if smoke:
        config.clips = {}

    config.scratch = "runs/study"  # Checkpoints, exports, logs and what cells share.
    config.keep_cells = False  # True: a cell's folder stays when its record is written.
    config.docs = "" if smoke else "docs/study"  # Tables and figures; "" means inside the workdir.

    return config.lock()
