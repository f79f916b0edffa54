"""Trains the tiny pipeline from nothing on clips of moving shapes.

Data, about two minutes. The autoencoder sees wider positions than the transformer, which learns
slowly where a shape may be anywhere:

    python -m qvgen_jax.data.moving_shapes --out data/wide_shapes --count 4096 --seed 0 --spread 6
    python -m qvgen_jax.data.moving_shapes --out data/moving_shapes --count 3072 --seed 0

Run:

    python main.py --config configs/tiny_pretrain.py --job pretrain --workdir runs/tiny
"""

import ml_collections


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    del arg
    config = ml_collections.ConfigDict()

    vae = config.vae_train = ml_collections.ConfigDict()
    vae.data = "data/wide_shapes"
    vae.seed = 0
    vae.dtype = "bfloat16"  # Computation; parameters and the last measurements are float32.
    # Wan 2.1's layout at a sixth of its width: 2.58 M parameters.
    vae.model = ml_collections.ConfigDict()
    vae.model.base_dim = 16
    vae.model.z_dim = 16
    vae.model.dim_mult = (1, 2, 4, 4)
    vae.model.num_res_blocks = 1
    vae.model.temperal_downsample = (False, True, True)
    # Frames, size, batch, steps.
    vae.stages = ((1, 32, 16, 2000), (5, 32, 8, 900), (9, 32, 4, 500), (17, 64, 2, 450))
    vae.learning_rate = 2e-3
    vae.warmup_steps = 100
    vae.weight_decay = 1e-4
    vae.foreground_weight = 5.0
    vae.kl_weight = 1e-4
    vae.log_every = 25
    vae.eval_every = 250
    vae.eval_clips = 16  # The first ones, not trained on.
    vae.statistics_clips = 512  # For the latents' mean and std.
    vae.checkpoint_seconds = 120

    flow = config.flow = ml_collections.ConfigDict()
    flow.architecture = "assets/tiny_wan"  # Its config files and tokenizer; not its weights.
    flow.data = "data/moving_shapes"
    flow.seed = 0
    flow.dtype = "float32"
    flow.steps = 16000
    flow.batch_size = 32
    flow.learning_rate = 1.5e-3
    flow.warmup_steps = 100
    flow.hold = 0.4  # Share of the steps before the cosine sets in.
    flow.weight_decay = 0.01
    flow.ema = 0.998
    flow.shift = 2.0
    flow.foreground_weight = 3.0
    flow.caption_dropout = 0.1
    flow.log_every = 50
    flow.evaluate_every = 1000
    flow.evaluate_videos = 64
    flow.checkpoint_every = 250
    # What the finished pipeline does by default; goes into its generation_config.json.
    flow.generation = ml_collections.ConfigDict()
    flow.generation.num_frames = 17
    flow.generation.height = 64
    flow.generation.width = 64
    flow.generation.steps = 25
    flow.generation.guidance_scale = 3.0
    flow.generation.fps = 8
    flow.generation.max_length = 16  # Every caption has 11 tokens.

    return config.lock()
