"""LSQ+ weights: range, codes, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.quant.weights import (
    dequantize_weight,
    fake_quantize_weight,
    quantize_weight,
    range_error,
    search_range,
)

LEVELS = jnp.asarray(15, jnp.float32)


def clipped_layer(key=0, features=(37, 11)):
    """A kernel whose scale is small enough that some codes are clipped on both sides."""
    kernel = jax.random.normal(jax.random.key(key), features)
    scale, zero_point = search_range(kernel, LEVELS)
    return kernel, 0.7 * scale, zero_point + 0.3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_searched_range_is_never_worse_than_min_max(bits):
    levels = jnp.asarray(2**bits - 1, jnp.float32)
    kernel = jax.random.normal(jax.random.key(bits), (65, 9)) ** 3
    low, high = kernel.min(0), kernel.max(0)
    scale = (high - low) / levels
    searched = range_error(kernel, *search_range(kernel, levels), levels)
    # The first factor tried is 1: equality up to the rounding of one multiplication.
    assert jnp.all(searched <= range_error(kernel, scale, -low / scale, levels) * (1 + 1e-5))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_are_signed_integers_in_range(bits):
    levels = jnp.asarray(2**bits - 1, jnp.float32)
    kernel = jax.random.normal(jax.random.key(bits), (300, 7))
    scale, zero_point = search_range(kernel, levels)
    codes = quantize_weight(kernel, scale, zero_point, levels)
    assert codes.dtype == jnp.int8
    assert int(codes.min()) >= -(2 ** (bits - 1))
    assert int(codes.max()) < 2 ** (bits - 1)
    np.testing.assert_allclose(
        dequantize_weight(codes, scale, zero_point, levels),
        fake_quantize_weight(kernel, scale, zero_point, levels),
        rtol=0,
        atol=1e-6,
    )


def test_a_constant_or_zero_channel_stays_finite_and_close():
    kernel = jnp.stack([jnp.zeros(8), jnp.full(8, 0.3), jnp.full(8, -2.0)], axis=1)
    quantized = fake_quantize_weight(kernel, *search_range(kernel, LEVELS), LEVELS)
    np.testing.assert_allclose(quantized, kernel, rtol=1e-5)


def test_kernel_gradient_is_one_exactly_where_unclipped():
    kernel, scale, zero_point = clipped_layer()
    unclamped = np.round(kernel / scale + zero_point)
    inside = (unclamped >= 0) & (unclamped <= 15)
    at_bounds = (unclamped == 0) | (unclamped == 15)
    grad = jax.grad(lambda k: fake_quantize_weight(k, scale, zero_point, LEVELS).sum())(kernel)
    np.testing.assert_array_equal(grad, inside.astype(np.float32))
    assert (~inside).any()
    assert at_bounds.any()


def test_zero_point_gradient_counts_clipped_entries():
    kernel, scale, zero_point = clipped_layer()
    unclamped = np.round(kernel / scale + zero_point)
    clipped = ((unclamped < 0) | (unclamped > 15)).sum(0)
    grad = jax.grad(lambda z: fake_quantize_weight(kernel, scale, z, LEVELS).sum())(zero_point)
    np.testing.assert_allclose(grad, -scale * clipped / np.sqrt(37 * 15), rtol=1e-5)


def test_scale_and_zero_point_gradients_match_finite_differences_of_the_surrogate():
    """The surrogate: rounding replaced by adding the rounding error that it had at the start."""
    with jax.enable_x64(True):
        kernel, scale, zero_point = (jnp.asarray(a, jnp.float64) for a in clipped_layer())
        cotangent = jax.random.normal(jax.random.key(5), kernel.shape, jnp.float64)
        start = kernel / scale + zero_point
        rounding = jnp.round(start) - start

        def surrogate(scale, zero_point):
            codes = jnp.clip(kernel / scale + zero_point + rounding, 0, 15)
            return jnp.sum(scale * (codes - zero_point) * cotangent, axis=0)

        _, pullback = jax.vjp(
            lambda s, z: fake_quantize_weight(kernel, s, z, LEVELS), scale, zero_point
        )
        d_scale, d_zero_point = pullback(cotangent)
        step, factor = 1e-6, 1 / np.sqrt(37 * 15)
        # Codes at a bound have a kink there; the inclusive mask is the derivative from inside.
        free = ~jnp.any((jnp.round(start) == 0) | (jnp.round(start) == 15), axis=0)
        for grad, move in ((d_scale, (step, 0)), (d_zero_point, (0, step))):
            ahead = surrogate(scale + move[0], zero_point + move[1])
            behind = surrogate(scale - move[0], zero_point - move[1])
            numeric = factor * (ahead - behind) / (2 * step)
            np.testing.assert_allclose(grad[free], numeric[free], rtol=1e-6, atol=1e-8)
        assert free.any()


def test_stacked_kernels_go_through_vmap():
    kernels = jax.random.normal(jax.random.key(3), (3, 17, 5))
    scale, zero_point = jax.vmap(search_range, in_axes=(0, None))(kernels, LEVELS)
    one = search_range(kernels[1], LEVELS)
    np.testing.assert_allclose(scale[1], one[0], rtol=1e-6)
    np.testing.assert_allclose(zero_point[1], one[1], rtol=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
def test_symmetric_weights_are_the_asymmetric_ones_with_the_zero_point_in_the_middle(bits):
    levels = jnp.asarray(2**bits - 1, jnp.float32)
    kernel = jax.random.normal(jax.random.key(bits), (65, 9)) ** 3
    scale, none = search_range(kernel, levels, symmetric=True)
    assert none is None
    middle = jnp.full_like(scale, 2 ** (bits - 1))
    codes = quantize_weight(kernel, scale, None, levels)
    np.testing.assert_array_equal(codes, quantize_weight(kernel, scale, middle, levels))
    weight = dequantize_weight(codes, scale, None, levels)
    np.testing.assert_array_equal(weight, dequantize_weight(codes, scale, middle, levels))
    widest = jnp.abs(kernel).max(0) / ((levels - 1) / 2)
    searched = range_error(kernel, scale, middle, levels)
    assert jnp.all(searched <= range_error(kernel, widest, middle, levels) * (1 + 1e-5))

    def loss(kernel, scale, zero_point):
        return jnp.sum(jnp.sin(fake_quantize_weight(kernel, scale, zero_point, levels)))

    found = jax.grad(loss, (0, 1))(kernel, 0.7 * scale, None)
    expected = jax.grad(loss, (0, 1))(kernel, 0.7 * scale, middle)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
