"""QVGen W4A4 on the embedded tiny Wan pipeline.

    python main.py --config configs/tiny_w4a4.py          # the demo: 32 clips, 2 CPU cores, minutes
    python -m qvgen_jax.data.moving_shapes --out data/moving_shapes_1024 --count 1024 --seed 1
    python main.py --config configs/tiny_w4a4.py:full     # the figures in the README

The demo trains on the 32 clips in `assets/clips` and judges 16 pairs of videos: it shows every
stage, not the method's quality. `full` trains on 1024 clips and judges
512 pairs.
"""

from ml_collections import ConfigDict

from configs._recipes import RECIPES, split, with_recipe


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: "" for the demo, "full" for the measured run; or a recipe of `configs/_recipes.py`, or
    "full,lsq"."""
    arg, recipe = split(arg)
    if arg not in ("", "full"):
        raise ValueError(f"tiny_w4a4 knows 'full' and one of {', '.join(RECIPES)}, not {arg!r}")
    full = arg == "full"

    config = ConfigDict()
    config.seed = 0
    config.method = "QVGen"  # What tables and the report call the student.
    config.model = "assets/tiny_wan"
    config.text_weights = "float"  # Of the text encoder: "float", or "int8", a byte each.
    config.compute_dtype = "float32"
    config.kernels = "auto"  # What multiplies the codes of an export, see kernels/choose.py.

    config.data = ConfigDict()
    config.data.source = "data/moving_shapes_1024" if full else "assets/clips"
    # "" means inside the workdir; the measured runs share theirs.
    config.data.encoded = "data/moving_shapes_1024_encoded" if full else ""
    config.data.num_frames = 17
    config.data.height = 64
    config.data.width = 64
    # Frames a second that clips are resampled to, the model's; 0 thins each video to one clip.
    config.data.fps = 0.0
    config.data.clips_per_video = 1  # At most; a long one gives several, spread evenly.
    config.data.crop = "centre"  # Or "random".
    # Sizes such as "49x480x832"; each video goes to the one that loses least. (): the size above.
    config.data.buckets = ()
    # True: clips are encoded when a batch asks for one and nothing is written; for small runs.
    config.data.on_the_fly = False
    config.data.max_length = 16
    config.data.encode_batch_size = 8
    config.data.most_refused = 0.1  # Share of videos that may be unusable; more end the run.

    config.quant = ConfigDict()
    config.quant.behaviour = "default"  # Or "released": as the authors' code does it.
    config.quant.weight_bits = 4
    config.quant.act_bits = 4
    config.quant.act_range = "token"  # Or "learned", "learned_zero": steps are parameters.
    config.quant.buckets = 50  # Clip pairs, or steps, over the timesteps.
    config.quant.rank = 32
    config.quant.shrink = 2
    config.quant.decay_shape = "cosine"
    config.quant.decay_fraction = 0.5
    config.quant.branch_moments = "reset"
    config.quant.decay_order = "smallest"  # Singular values that leave first; or "largest".
    config.quant.refactor = True  # A new SVD at every halving; False: the columns as they are.
    config.quant.branch_space = "tokens"  # Or "weights", as the release does; "merged": an adapter.
    config.quant.symmetric_weights = False  # True: zero is the middle of the codes.
    config.quant.include_zero = ""  # In every token's range: "yes", "no", or the behaviour's own.
    # These two are not of QVGen: our study chose them (docs/study.md).
    config.quant.rotation = "hadamard"  # Before the activations are quantized; or "none".
    config.quant.smoothing = 0.5  # Strength of moving outliers into the weights; 0 is off.
    config.quant.time_table = False  # True: the timestep's own linears become a table.
    config.quant.table_steps = ()  # It serves the pipeline's own number of steps, and these.
    config.quant.clip_index = ""  # The behaviour's own, or one of quant/clips.py.
    # Layers that differ: (name, weight bits, activation bits), and those left as they are. A name
    # such as blocks.ffn.up is of all blocks, blocks.3.ffn.up of one.
    config.quant.bits = ()
    config.quant.bits_file = ""  # Of --job mixed, in their place (docs/mixed.md).
    config.quant.full_precision = ()
    config.quant.product_dtype = "bfloat16"

    config.train = ConfigDict()
    config.train.steps = 1200 if full else 150
    config.train.batch_size = 32 if full else 16
    config.train.accumulate = 1
    config.train.warmup_steps = config.train.steps // 20
    config.train.learning_rate = ConfigDict(
        # The tiny model was trained at 1.5e-3 and has larger weights than the 2B, whose recipe is
        # 3e-5 throughout. In a W3A3 trial 200 steps at 1e-3 reached a lower loss (0.185) than 300
        # at 5e-4 (0.20).
        {"weights": 1e-3, "branch": 1e-3, "scales": 2e-4, "clips": 1e-2}
    )
    config.train.freeze_weights = False  # True: branch, scales and clips train alone.
    config.train.scale_aware = False  # True: the branch's rate times its layer's scale.
    config.train.schedule = "cosine"  # To 0; or "constant_tail", level once the branch is gone.
    config.train.tail_rate = 0.0  # Of the peak, in that tail; 0: what the cosine has there.
    config.train.beta1 = 0.9
    config.train.beta2 = 0.95
    config.train.epsilon = 1e-8
    config.train.weight_decay = 1e-4
    config.train.clip_norm = 1.0
    config.train.shift = 2.0  # The pipeline's own training shift.
    config.train.caption_dropout = 0.05
    config.train.truth_blend = 0.0  # a of l(t); 0: the teacher alone is the target.
    config.train.target = "teacher"  # Or "truth": the ground truth alone.
    config.train.teacher_weights = "float"  # Or "int8": a byte each, see docs/pods.md.
    config.train.ema_decay = 0.0  # Of the exported weights, once the branch is gone; 0 is off.
    config.train.remat = "blocks"
    config.train.log_every = 20 if full else 5
    config.train.log_spectrum = True  # An SVD of every branch for each logged step.
    config.train.checkpoint_every = 100 if full else 50
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
    config.sample.prompts = "held_out"  # Or a text file with one prompt per line.
    config.sample.count = 8  # Pairs of videos shown in the report.
    config.sample.seed = 0
    config.sample.batch_size = 16
    config.sample.unguided_steps = 0  # So many last steps of a video run without guidance.

    config.evaluate = ConfigDict()
    config.evaluate.videos = 512 if full else 16  # Of sample.prompts; 0 for none.
    config.evaluate.shown = 8  # Of those, the first that are kept to look at.
    config.evaluate.pixels = True  # PSNR and SSIM, which decode every video a second time.
    config.evaluate.seed = 1000
    config.evaluate.round_to_nearest = True  # Compare with no training at all.
    config.evaluate.held_out = ""  # Clips never trained on, for the distillation loss; or "".
    config.evaluate.held_out_encoded = ""  # "" means inside the workdir.
    config.evaluate.drift_videos = 0  # Compared in their final latents with full precision's.
    config.evaluate.reference = ""  # Full precision's answers; "" means inside the workdir.

    # Of --job quantize alone, see docs/quantize.md.
    config.calibration = ConfigDict()
    config.calibration.prompts = "assets/tiny_prompts.txt"  # Not those that are judged.
    config.calibration.count = 4  # Of them; one video each.
    config.calibration.steps = 10  # Of the sampler.
    config.calibration.every = 2  # So many steps give one whose inputs are kept.
    config.calibration.batch_size = 20  # Samples at once.
    config.calibration.rows = 512  # Of each linear's tokens, for what is searched and reported.
    config.calibration.rounding = ""  # The method's own; "nearest" or "gptq".
    config.calibration.damping = 0.01  # Of GPTQ, as a share of the mean of the diagonal.
    config.calibration.by_activity = False  # GPTQ takes the loudest channels first.
    config.calibration.exponent = 0.0  # Of fixed smoothing; 0: the method's own.
    config.calibration.smoothing_points = 10  # Of the grid of exponents that is searched.
    config.calibration.rank = 32  # Of the branch that svdquant keeps.
    config.calibration.branch_iterations = 1  # At most so many SVDs of it; the paper has one.

    return with_recipe(config, recipe).lock()
