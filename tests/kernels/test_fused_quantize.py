"""Tokens quantized where they are made are those quantized afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.fused_quantize import quantize_gelu, quantize_normalized, quantize_several
from kernels.quantize_tokens import quantize_tokens
from qvgen_jax.models.layers import layer_norm

LEVELS = jnp.float32(15)


def clips(count):
    keys = jax.random.split(jax.random.key(count), 2 * count)
    drawn = [jax.random.uniform(key, (2, 1, 1), jnp.float32, 0.5, 1) for key in keys]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_three_linears_get_the_codes_of_their_own_clips(backend):
    x = jax.random.normal(jax.random.key(0), (2, 5, 33))
    found = quantize_several(x, clips(3), LEVELS, backend=backend, include_zero=False)
    for tokens, (lower, upper) in zip(found, clips(3), strict=True):
        same(tokens, quantize_tokens(x, lower, upper, LEVELS, include_zero=False))
    assert not np.array_equal(found[0].codes, found[1].codes)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("modulated", [False, True])
def test_a_norm_in_front_is_the_models_own(dtype, affine, modulated):
    keys = jax.random.split(jax.random.key(1), 5)
    x = jax.random.normal(keys[0], (2, 5, 33), dtype)
    weight, bias = (jax.random.normal(key, (33,)) for key in keys[1:3])
    scale, shift = (jax.random.normal(key, (2, 33)) for key in keys[3:])
    y, more = layer_norm(x, 1e-6), {}
    if affine:
        y, more = y * weight + bias, {"weight": weight, "bias": bias}
    if modulated:
        y, more = (
            y * (1 + scale[:, None]) + shift[:, None],
            {**more, "scale": scale, "shift": shift},
        )
    (found,) = quantize_normalized(x, clips(1), LEVELS, eps=1e-6, **more)
    same(found, quantize_tokens(y.astype(dtype), *clips(1)[0], LEVELS))


def test_a_gelu_in_front_is_computed_in_float32_and_rounded_once():
    x = jax.random.normal(jax.random.key(2), (2, 5, 33), jnp.bfloat16)
    lower, upper = clips(1)[0]
    y = jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(jnp.bfloat16)
    same(quantize_gelu(x, lower, upper, LEVELS), quantize_tokens(y, lower, upper, LEVELS))
