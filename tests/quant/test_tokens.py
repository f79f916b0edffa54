"""Gradients of quantized activations with learned clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantize_tokens import quantize_tokens
from qvgen_jax.quant.tokens import clip_multipliers, fake_quantize_tokens, initial_clips

LEVELS = jnp.asarray(15, jnp.float32)


def test_values_are_those_of_the_integers():
    x = jax.random.normal(jax.random.key(0), (2, 3, 19))
    values, tokens = fake_quantize_tokens(x, jnp.float32(0.9), jnp.float32(0.8), LEVELS)
    plain = quantize_tokens(x, jnp.float32(0.9), jnp.float32(0.8), LEVELS)
    jax.tree.map(np.testing.assert_array_equal, tokens, plain)
    np.testing.assert_array_equal(
        values, plain.scale * (plain.codes.astype(jnp.float32) - plain.zero_point)
    )


def test_gradients_match_finite_differences_of_the_surrogate():
    """The surrogate freezes each rounding error and the zero point."""
    with jax.enable_x64(True):
        x = jax.random.normal(jax.random.key(1), (1, 6, 9), jnp.float64)
        cotangent = jax.random.normal(jax.random.key(2), x.shape, jnp.float64)
        clips = jnp.asarray(0.7, jnp.float64), jnp.asarray(0.6, jnp.float64)

        def parts(x, lower, upper):
            scale = (upper * x.max(-1, keepdims=True) - lower * x.min(-1, keepdims=True)) / 15
            return scale, x / scale

        scale, ratio = parts(x, *clips)
        zero_point = jnp.clip(-jnp.round(clips[0] * x.min(-1, keepdims=True) / scale), 0, 15)
        rounding = jnp.round(ratio) - ratio
        codes = jnp.round(ratio) + zero_point

        def surrogate(x, lower, upper):
            scale, ratio = parts(x, lower, upper)
            moved = ratio + rounding + zero_point
            # The clamp's side is frozen too: at a bound the derivative is the one from inside.
            moved = jnp.where(codes < 0, 0, jnp.where(codes > 15, 15, moved))
            return jnp.sum(scale * (moved - zero_point) * cotangent)

        def ours(x, lower, upper):
            values = fake_quantize_tokens(x, lower, upper, LEVELS, range_dtype=jnp.float64)[0]
            return jnp.sum(values * cotangent)

        grads = jax.grad(ours, (0, 1, 2))(x, *clips)
        step = 1e-6
        for i in range(3):
            direction = [jnp.zeros_like(a) for a in (x, *clips)]
            shape = direction[i].shape
            direction[i] = jax.random.normal(jax.random.key(i), shape, jnp.float64)
            ahead = [a + step * d for a, d in zip((x, *clips), direction, strict=True)]
            behind = [a - step * d for a, d in zip((x, *clips), direction, strict=True)]
            numeric = (surrogate(*ahead) - surrogate(*behind)) / (2 * step)
            np.testing.assert_allclose(jnp.sum(grads[i] * direction[i]), numeric, rtol=1e-6)
        assert ((codes < 0) | (codes > 15)).any()


def test_the_clips_of_other_timesteps_get_no_gradient():
    x = jax.random.normal(jax.random.key(3), (2, 4, 9))

    def loss(clips):
        multipliers = clip_multipliers(clips, jnp.asarray([3, 7]), x.ndim)
        return jnp.sum(fake_quantize_tokens(x, multipliers, multipliers, LEVELS)[0] ** 2)

    grad = jax.grad(loss)(initial_clips(50))
    assert set(np.flatnonzero(grad)) == {3, 7}


def test_one_clip_pair_needs_no_index_and_several_do():
    np.testing.assert_allclose(clip_multipliers(initial_clips(1), None, 3), 0.95, rtol=1e-6)
    with pytest.raises(ValueError, match="clip_index"):
        clip_multipliers(initial_clips(50), None, 3)


def test_bfloat16_activations_get_bfloat16_values_and_gradients():
    x = jax.random.normal(jax.random.key(4), (1, 3, 8), jnp.bfloat16)
    one = jnp.float32(0.95)
    values, tokens = fake_quantize_tokens(x, one, one, LEVELS)
    grad = jax.grad(lambda x: fake_quantize_tokens(x, one, one, LEVELS)[0].sum().astype(float))(x)
    assert values.dtype == grad.dtype == jnp.bfloat16
    assert tokens.scale.dtype == jnp.float32
