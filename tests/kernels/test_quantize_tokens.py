"""Tokens to integers: range, codes, and the values they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.quantize_tokens import dequantize_tokens, extreme, quantize_tokens, share_among

ONE = jnp.ones((), jnp.float32)


def levels(bits):
    return jnp.asarray(2**bits - 1, jnp.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_integers_in_range_with_at_most_two_to_the_bits_values(bits):
    x = 3 * jax.random.normal(jax.random.key(bits), (3, 7, 301))
    tokens = quantize_tokens(x, 0.9 * ONE, 0.8 * ONE, levels(bits))
    codes = np.asarray(tokens.codes, np.int32)
    half = 2 ** (bits - 1)
    assert tokens.codes.dtype == jnp.int8
    assert codes.min() >= -half
    assert codes.max() < half
    values = np.asarray(dequantize_tokens(tokens)).reshape(-1, 301)
    assert max(len(np.unique(row)) for row in values) <= 2**bits
    np.testing.assert_array_equal(tokens.row_sum[..., 0], codes.sum(-1))
    np.testing.assert_array_equal(tokens.zero_point, np.round(tokens.zero_point))


def test_an_unclipped_token_is_within_half_a_step():
    x = jax.random.normal(jax.random.key(0), (4, 33))
    tokens = quantize_tokens(x, ONE, ONE, levels(4))
    # The integer zero point moves the grid by up to half a step at the ends of the range.
    assert jnp.all(jnp.abs(dequantize_tokens(tokens) - x) <= 1.0001 * tokens.scale)


def test_zero_is_represented_exactly():
    x = jax.random.normal(jax.random.key(1), (5, 17)).at[:, 3].set(0)
    x = x.at[0].add(9.0).at[0, 3].set(9.0)
    tokens = quantize_tokens(x, 0.95 * ONE, 0.95 * ONE, levels(4))
    np.testing.assert_array_equal(dequantize_tokens(tokens)[1:, 3], 0)


@pytest.mark.parametrize("token", [[0.0] * 5, [5.0] * 5, [-5.0] * 5, [5.0, 5.05, 5.1, 5.15, 5.2]])
def test_constant_and_one_sided_tokens_stay_finite_and_close(token):
    x = jnp.asarray([token], jnp.float32)
    values = dequantize_tokens(quantize_tokens(x, 0.95 * ONE, 0.95 * ONE, levels(4)))
    # The clip at 0.95 of the maximum costs 5 %, rounding at most half of 1/15.
    assert jnp.all(jnp.abs(values - x) <= 0.09 * jnp.abs(x))


def test_without_zero_in_the_range_a_token_far_from_zero_collapses_as_in_the_release():
    x = jnp.asarray([[5.0, 5.1, 5.2]], jnp.float32)
    ratio = 0.95 * ONE
    values = dequantize_tokens(
        quantize_tokens(x, ratio, ratio, levels(4), include_zero=False, clip_ratio=0.95)
    )
    np.testing.assert_allclose(values, 0.18, atol=0.01)


def test_a_nan_reaches_the_scale():
    x = jnp.asarray([[1.0, jnp.nan]], jnp.float32)
    assert jnp.isnan(quantize_tokens(x, ONE, ONE, levels(4)).scale).all()


@pytest.mark.parametrize("largest", [False, True])
def test_extremes_and_their_gradients_are_those_of_jnp(largest):
    x = jnp.asarray(np.random.default_rng(5).integers(-3, 4, (6, 9)), jnp.float32)  # With ties.
    weights = jnp.arange(1.0, 7.0)[:, None]
    ours, theirs = (
        jax.value_and_grad(lambda x, f=f: jnp.sum(weights * f(x)))(x)
        for f in (
            lambda x: extreme(x, largest),
            lambda x: (jnp.max if largest else jnp.min)(x, axis=-1, keepdims=True),
        )
    )
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_an_extreme_is_found_though_its_token_was_computed_twice():
    """A compiler may round the second time otherwise; and what is nowhere gives zeros, no NaN."""
    x = jnp.asarray([[1.0, 2.0, 3.0], [1.0, 3.0, 3.0], [1.0, 2.0, 3.0]])
    value = jnp.asarray([[np.nextafter(np.float32(3), np.float32(4))], [3.0], [3.1]])
    gradient = share_among(x, value, jnp.ones((3, 1)))
    np.testing.assert_array_equal(gradient, [[0, 0, 1], [0, 0.5, 0.5], [0, 0, 0]])
