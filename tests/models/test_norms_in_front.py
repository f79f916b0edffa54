"""Norms that a quantizer may compute on its way: where none does, models are what they were."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.models import (
    build_transformer,
    cogvideox_block,
    config_from_json,
    layers,
    quantizable,
    wan,
    wan_block,
)
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantize_params
from tests.compiling import optimized
from tests.golden import tiny_models

FIELDS = {
    "wan": {"_class_name": "WanTransformer3DModel", **tiny_models.WAN_ODD},
    "cogvideox": {"_class_name": "CogVideoXTransformer3DModel", **tiny_models.COGVIDEOX},
}


def written_out(linears, tokens, ctx):
    """What the blocks would say without `apply_normalized`."""
    x = tokens.x.astype(jnp.float32)
    centred = x - x.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + tokens.eps)
    if tokens.weight is not None:
        y = y * tokens.weight + tokens.bias
    scale, shift = tokens.scale, tokens.shift
    if tokens.leading_rows:
        is_text = jnp.arange(x.shape[1])[:, None] < tokens.leading_rows
        scale, shift = (jnp.where(is_text, part[:, :1], part[:, 1:]) for part in (scale, shift))
    if scale is not None:
        y = y * (1 + scale) + shift
    return [linear(y.astype(tokens.dtype), ctx) for linear in linears]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("model", FIELDS)
def test_training_has_the_bits_of_the_formula_written_out(monkeypatch, model, dtype):
    config, quant = config_from_json(FIELDS[model]), QuantConfig(rank=0)
    plain = nnx.to_pure_dict(nnx.state(build_transformer(config, key=jax.random.key(0)), nnx.Param))
    # Norms with parameters that are neither one nor zero.
    flat, tree = jax.tree.flatten(plain)
    keys = jax.random.split(jax.random.key(1), len(flat))
    moved = [a + 0.1 * jax.random.normal(key, a.shape) for a, key in zip(flat, keys, strict=True)]
    params, levels = quantize_params(tree.unflatten(moved), quantizable(config), quant)
    built = nnx.eval_shape(
        lambda: build_transformer(
            config, key=jax.random.key(0), dense=dense_factory(quant, "train"), dtype=dtype
        )
    )
    graph = nnx.split(built, nnx.Param, Levels)[0]
    width = config.text_dim if model == "wan" else config.text_embed_dim
    latents = jax.random.normal(jax.random.key(2), (2, 3, 4, 6, config.in_channels))
    text = jax.random.normal(jax.random.key(3), (2, 5, width))

    def forward():
        run = optimized(lambda *x: nnx.merge(graph, params, levels)(*x))
        return run(latents, jnp.asarray([951.0, 20.0]), text)

    found = forward()
    for module in (layers, wan, wan_block, cogvideox_block):
        monkeypatch.setattr(module, "apply_normalized", written_out)
    np.testing.assert_array_equal(found, forward())
