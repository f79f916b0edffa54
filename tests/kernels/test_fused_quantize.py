"""Tokens quantized where they are made are those quantized afterwards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import triton_quantize
from kernels.fused_quantize import (
    Normalized,
    quantize_gelu,
    quantize_normalized,
    quantize_several,
)
from kernels.quantize_tokens import quantize_tokens

LEVELS = jnp.float32(15)


def clips(count):
    keys = jax.random.split(jax.random.key(count), 2 * count)
    drawn = [jax.random.uniform(key, (2, 1, 1), jnp.float32, 0.5, 1) for key in keys]
    return list(zip(drawn[::2], drawn[1::2], strict=True))


def same(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_fourth_set_of_codes_is_refused_with_or_without_a_norm():
    x, ones = jnp.ones((4, 64)), jnp.ones(())
    for quantize, more in (("quantize_several", {}), ("quantize_normalized", {"eps": 1e-6})):
        with pytest.raises(ValueError, match="4 clips; expected 1 to 3"):
            getattr(triton_quantize, quantize)(
                x, [triton_quantize.Clip(ones, ones)] * 4, LEVELS, **more
            )


@pytest.mark.parametrize("backend", ["xla", "triton"])
def test_three_linears_get_the_codes_of_their_own_clips(backend):
    x = jax.random.normal(jax.random.key(0), (2, 5, 33))
    found = quantize_several(x, clips(3), LEVELS, backend=backend, include_zero=False)
    for tokens, (lower, upper) in zip(found, clips(3), strict=True):
        same(tokens, quantize_tokens(x, lower, upper, LEVELS, include_zero=False))
    assert not np.array_equal(found[0].codes, found[1].codes)


def tokens_of(dtype, affine, parts, leading):
    keys = jax.random.split(jax.random.key(1), 5)
    x = jax.random.normal(keys[0], (2, 5, 33), dtype)
    weight, bias = (jax.random.normal(key, (33,)) for key in keys[1:3]) if affine else (None, None)
    shape = (2, parts, 33)
    scale, shift = (jax.random.normal(key, shape) if parts else None for key in keys[3:])
    return Normalized(x, 1e-6, dtype, weight, bias, scale, shift, leading)


def in_float64(tokens):
    """The tokens' values on paper, but for the rounding to their dtype."""
    x = np.asarray(tokens.x, np.float64)
    y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + tokens.eps)
    if tokens.weight is not None:
        y = y * np.asarray(tokens.weight) + np.asarray(tokens.bias)
    if tokens.scale is not None:
        part = np.arange(5) >= tokens.leading_rows if tokens.leading_rows else np.zeros(5, int)
        scale, shift = (np.asarray(z)[:, part.astype(int)] for z in (tokens.scale, tokens.shift))
        y = y * (1 + scale) + shift
    return y


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("parts", "leading"), [(0, 0), (1, 0), (2, 3)])
def test_a_norm_in_front_gives_the_codes_of_its_values(dtype, affine, parts, leading):
    tokens = tokens_of(dtype, affine, parts, leading)
    assert tokens.values().dtype == dtype
    # Norms of float32: a few units in its last place, or in bfloat16's.
    rtol = float(jnp.finfo(dtype).eps) * 8
    np.testing.assert_allclose(
        tokens.values().astype(jnp.float32), in_float64(tokens), rtol=rtol, atol=1e-5
    )
    (found,) = quantize_normalized(tokens, clips(1), LEVELS)
    same(found, quantize_tokens(tokens.values(), *clips(1)[0], LEVELS))


@pytest.mark.parametrize(("parts", "leading"), [(0, 0), (1, 0), (2, 3)])
def test_the_gpu_s_kernel_is_handed_the_same_tokens(monkeypatch, parts, leading):
    """Its operands as `triton_quantize` documents them, evaluated in float64."""
    tokens = tokens_of(jnp.float32, True, parts, leading)

    def kernel(flat, given, levels, *, eps, dtype, weight, bias, **more):
        y = np.asarray(flat, np.float64)
        y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + eps)
        y = y * np.asarray(weight) + np.asarray(bias)
        if "scale" in more:
            rows, first = more["rows_per_batch"], more["leading_rows"]
            group = np.arange(len(y)) // rows
            if first:
                group = 2 * group + (np.arange(len(y)) % rows >= first)
            y = y * (1 + np.asarray(more["scale"])[group]) + np.asarray(more["shift"])[group]
        return [quantize_tokens(jnp.asarray(y, dtype), *clip, levels) for clip in given]

    monkeypatch.setattr(triton_quantize, "quantize_normalized", kernel)
    found = quantize_normalized(tokens, clips(3), LEVELS, backend="hopper")
    for one, clip in zip(found, clips(3), strict=True):
        expected = quantize_tokens(tokens.values(), *clip, LEVELS)
        np.testing.assert_allclose(one.scale, expected.scale, rtol=1e-5)
        # At a rounding boundary the last bit of the norm decides: one code in 100 may be off by 1.
        off = abs(np.asarray(one.codes, int) - np.asarray(expected.codes, int))
        assert off.max() <= 1
        assert off.mean() <= 0.01


def test_a_gelu_in_front_is_computed_in_float32_and_rounded_once():
    x = jax.random.normal(jax.random.key(2), (2, 5, 33), jnp.bfloat16)
    lower, upper = clips(1)[0]
    y = jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(jnp.bfloat16)
    same(quantize_gelu(x, lower, upper, LEVELS), quantize_tokens(y, lower, upper, LEVELS))
