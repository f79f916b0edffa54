"""QVGen W4A4 on Wan 2.1 text-to-video 1.3B: the paper's recipe, and rotation and smoothing.

    python main.py --config configs/wan1_3b_w4a4.py --config.data.source=FOLDER
    python main.py --config configs/wan1_3b_w4a4.py:released --config.data.source=FOLDER

FOLDER holds videos and their captions (the paper: 16,000 clips, 8 epochs). `released` switches to
the behaviour of the authors' code, its mistakes included, for comparison.

Hardware: the paper trained on 8 H100, 11.11 GPU-days. Not run here: neither weights nor such chips
were at hand. Expected (paper, VBench): near BF16 on every dimension.
"""

from ml_collections import ConfigDict

from configs._recipes import RECIPES, split, with_recipe


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for our defaults, or a recipe of `configs/_recipes.py`."""
    arg, recipe = split(arg)
    if arg:
        raise ValueError(f"this config knows one of {', '.join(RECIPES)}, not {arg!r}")

    config = ConfigDict()
    config.seed = 0
    config.method = "QVGen"
    config.model = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    config.text_weights = "float"  # Of the text encoder: "float", or "int8", a byte each.
    config.compute_dtype = "bfloat16"
    config.kernels = "auto"  # What multiplies the codes of an export, see kernels/choose.py.

    config.data = ConfigDict()
    config.data.source = ""  # Required: your videos and captions.
    config.data.encoded = ""  # "" means inside the workdir.
    config.data.num_frames = 49
    config.data.height = 480
    config.data.width = 832
    # Frames a second that clips are resampled to, the model's; 0 thins each video to one clip.
    config.data.fps = 16.0
    config.data.clips_per_video = 1  # At most; a long one gives several, spread evenly.
    config.data.crop = "centre"  # Or "random".
    # Sizes such as "49x480x832"; each video goes to the one that loses least. (): the size above.
    config.data.buckets = ()
    # True: clips are encoded when a batch asks for one and nothing is written; for small runs.
    config.data.on_the_fly = False
    config.data.max_length = 512
    config.data.encode_batch_size = 1
    config.data.most_refused = 0.1  # Share of videos that may be unusable; more end the run.

    config.quant = ConfigDict()
    config.quant.behaviour = "default"
    config.quant.weight_bits = 4
    config.quant.act_bits = 4
    config.quant.clip_index = ""
    config.quant.bits = ()
    config.quant.bits_file = ""  # Of --job mixed, in their place (docs/mixed.md).
    config.quant.full_precision = ()
    config.quant.act_range = "token"
    config.quant.buckets = 50
    config.quant.rank = 32
    config.quant.shrink = 2
    config.quant.decay_shape = "cosine"
    # The paper decays to the last step (T = 444); ours leaves steps for the pure low-bit model.
    config.quant.decay_fraction = 0.7
    config.quant.branch_moments = "reset"
    config.quant.decay_order = "smallest"
    config.quant.refactor = True
    config.quant.branch_space = "tokens"
    config.quant.symmetric_weights = False
    config.quant.include_zero = ""
    # Not of QVGen: our study chose these two (docs/study.md).
    config.quant.rotation = "hadamard"
    config.quant.smoothing = 0.5
    config.quant.time_table = False
    config.quant.table_steps = ()
    config.quant.product_dtype = "bfloat16"

    config.train = ConfigDict()
    config.train.steps = 2667
    config.train.batch_size = 48
    config.train.accumulate = 1
    config.train.warmup_steps = 267
    config.train.learning_rate = ConfigDict(
        {"weights": 3e-5, "branch": 3e-5, "scales": 3e-5, "clips": 1e-2}
    )
    config.train.freeze_weights = False
    config.train.scale_aware = False
    config.train.schedule = "cosine"
    config.train.tail_rate = 0.0
    config.train.beta1 = 0.9
    config.train.beta2 = 0.95
    config.train.epsilon = 1e-8
    config.train.weight_decay = 1e-4
    config.train.clip_norm = 1.0
    config.train.shift = 1.0
    config.train.caption_dropout = 0.05
    config.train.truth_blend = 0.0
    config.train.target = "teacher"
    config.train.teacher_weights = "float"  # Or "int8": a byte each, see docs/pods.md.
    config.train.ema_decay = 0.0
    config.train.remat = "blocks"
    config.train.log_every = 10
    config.train.log_spectrum = True
    config.train.checkpoint_every = 100
    config.train.keep_checkpoints = 2
    config.train.profile_steps = 0  # So many are traced once the run is warm, to WORKDIR/profile.
    config.train.hang_minutes = 60.0  # A step that takes longer ends the run; 0 never does.
    # Updates that are not finite are skipped. After more than so many in a row the run goes back to
    # its last checkpoint and takes the data in another order; so often at most.
    config.train.most_skipped = 20
    config.train.fresh_orders = 2
    # So often the student is asked for evaluate.held_out, and the best without a branch is kept.
    config.train.validate_every = 0
    config.train.validate_videos = 0  # So many are filmed then, beside the teacher's own.
    config.train.export_best = False  # True: the best is exported, else the last.
    config.train.wandb_project = ""

    config.mesh = ConfigDict({"data": 1, "fsdp": -1, "context": 0, "tensor": 1})
    config.mesh.across_slices = ConfigDict({"data": 1, "fsdp": 1})

    config.sample = ConfigDict()
    config.sample.prompts = "assets/prompts.txt"
    config.sample.count = 8
    config.sample.seed = 0
    config.sample.batch_size = 1
    config.sample.unguided_steps = 0

    config.evaluate = ConfigDict()
    config.evaluate.videos = 0  # Of sample.prompts; 0 for none.
    config.evaluate.shown = 8  # Of those, the first that are kept to look at.
    config.evaluate.pixels = True  # PSNR and SSIM, which decode every video a second time.
    config.evaluate.seed = 1000
    config.evaluate.round_to_nearest = True
    config.evaluate.held_out = ""
    config.evaluate.held_out_encoded = ""
    config.evaluate.drift_videos = 0
    config.evaluate.reference = ""

    # Of --job quantize alone, see docs/quantize.md.
    config.calibration = ConfigDict()
    config.calibration.prompts = "assets/calibration_prompts.txt"  # Not those that are judged.
    config.calibration.count = 4  # Of them; one video each.
    config.calibration.steps = 20  # Of the sampler.
    config.calibration.every = 5  # So many steps give one whose inputs are kept.
    config.calibration.batch_size = 1  # Samples at once.
    config.calibration.rows = 2048  # Of each linear's tokens, for what is searched and reported.
    config.calibration.rounding = ""  # The method's own; "nearest" or "gptq".
    config.calibration.damping = 0.01  # Of GPTQ, as a share of the mean of the diagonal.
    config.calibration.by_activity = False  # GPTQ takes the loudest channels first.
    config.calibration.exponent = 0.0  # Of fixed smoothing; 0: the method's own.
    config.calibration.smoothing_points = 10  # Of the grid of exponents that is searched.
    config.calibration.rank = 32  # Of the branch that svdquant keeps.
    config.calibration.branch_iterations = 1  # At most so many SVDs of it; the paper has one.

    return with_recipe(config, recipe).lock()
