"""Small transformers of both families with random parameters, and inputs for them."""

import jax
import numpy as np

from qvgen_jax.models import TransformerConfig, abstract_params
from qvgen_jax.models.cogvideox import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig
from tests.golden.tiny_models import COGVIDEOX, WAN

MODELS = {
    "wan": WanConfig(**WAN),
    "cogvideox": CogVideoXConfig.from_json(COGVIDEOX),
}


def random_params(model: TransformerConfig) -> dict:
    """Host arrays."""
    rng = np.random.default_rng(0)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        size = leaf.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.3
        return (size * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def inputs(model: TransformerConfig, samples: int = 4) -> tuple[np.ndarray, ...]:
    """Latents `[samples, 2, 4, 6, channels]`, timesteps and text."""
    rng = np.random.default_rng(1)
    text_dim = model.text_dim if isinstance(model, WanConfig) else model.text_embed_dim
    latents = rng.normal(size=(samples, 2, 4, 6, model.in_channels))
    timesteps = np.linspace(900, 40, samples)
    text = rng.normal(size=(samples, 5, text_dim))
    return tuple(array.astype(np.float32) for array in (latents, timesteps, text))
