"""The smallest Wan pipelines with random weights, in full precision and as real exports."""

from pathlib import Path

import jax
import numpy as np
from flax import nnx

from convert.export import export_pipeline
from convert.load import read_transformer
from convert.save import save_pipeline
from qvgen_jax.autoencoders.wan import WanVAE
from qvgen_jax.models import quantizable
from qvgen_jax.models.wan import WanTransformer
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import round_to_nearest
from qvgen_jax.text.t5 import T5Encoder
from tests.test_pipeline import TEXT, TOKENIZER, TRANSFORMER, VAE

# Square, and as large as the judge needs.
SETTINGS = {"num_frames": 5, "height": 32, "width": 32, "steps": 2, "guidance_scale": 1.0, "fps": 8}


def _random(build, rng: np.random.Generator) -> dict:
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32) + (leaf.ndim < 2), shapes
    )


def write_full(folder: Path, transformer=TRANSFORMER, seed: int = 0, **settings) -> Path:
    """A pipeline whose weights, autoencoder and all, are drawn from the seed."""
    rng, key = np.random.default_rng(seed), jax.random.key(0)
    save_pipeline(
        folder,
        transformer=(transformer, _random(lambda: WanTransformer(transformer, key=key), rng)),
        vae=(VAE, _random(lambda: WanVAE(VAE, key=key), rng)),
        text_encoder=(TEXT, _random(lambda: T5Encoder(TEXT, key=key), rng)),
        tokenizer_folder=TOKENIZER,
        generation_config=SETTINGS | settings,
    )
    return folder


def write_export(full: Path, folder: Path, bits: int) -> Path:
    """The same rounded to nearest and packed."""
    model = read_transformer(full / "transformer", np.dtype("float32"))
    quant = QuantConfig(weight_bits=bits, act_bits=bits, rank=0)
    params, levels = round_to_nearest(model.states[0], quantizable(model.config), quant)
    export_pipeline(full, folder, model.config, params, quant, levels=levels)
    return folder
