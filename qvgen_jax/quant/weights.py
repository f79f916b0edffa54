"""LSQ+ weights: one learned scale and one learned real zero point per output channel.

Source: LSQ+ (arXiv 2004.09576) as QVGen uses it. Where the zero point is None the weights are
symmetric: it lies in the middle, 2^(bits - 1), where a product needs no correction. Every function
takes one kernel `[in, out]`; stacked kernels `[layers, in, out]` go through `jax.vmap` or
`jax.lax.map`.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kernels.reference import at_least_float32, dequantize, signed_offset

_SMALLEST_SCALE = 1e-9
_SHRINK = np.asarray([1 - i / 100 for i in range(80)], np.float32)
_ERROR_POWER = 2.4


def _scale_and_zero_point(low: jax.Array, high: jax.Array, levels: jax.Array):
    scale = jnp.maximum((high - low) / levels, jnp.asarray(_SMALLEST_SCALE, low.dtype))
    return scale, -low / scale


def range_error(
    kernel: jax.Array, scale: jax.Array, zero_point: jax.Array, levels: jax.Array
) -> jax.Array:
    """Sum over the input axis of |quantized - kernel|^2.4: `[out]`."""
    codes = jnp.clip(jnp.round(kernel / scale + zero_point), 0, levels)
    error = scale * (codes - zero_point) - kernel
    return jnp.sum(jnp.abs(error) ** _ERROR_POWER, axis=0)


def _symmetric_scale(bound: jax.Array, levels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`[-bound, bound]` on the codes -(2^(b-1) - 1) to 2^(b-1) - 1; one code more lies below."""
    scale = jnp.maximum(bound / ((levels - 1) / 2), jnp.asarray(_SMALLEST_SCALE, bound.dtype))
    return scale, signed_offset(levels)


def _middle(zero_point: jax.Array | None, levels: jax.Array) -> jax.Array:
    return signed_offset(levels) if zero_point is None else zero_point


def search_range(
    kernel: jax.Array, levels: jax.Array, symmetric: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """The initial scale and zero point of every output channel.

    Shrinks the channel's (min, max) by 1.00, 0.99, ... 0.21 and keeps the first factor with the
    least error. Computed one factor at a time: memory of one kernel.

    Args:
        kernel: `[in, out]`.
        levels: `[]`, 2^bits - 1.
        symmetric: search ranges around zero.

    Returns:
        scale and zero_point (real, unsigned convention; None if symmetric), `[out]` in float32 or a
        kernel's float64.
    """
    kernel = at_least_float32(kernel)
    levels = levels.astype(kernel.dtype)
    low, high = jnp.min(kernel, axis=0), jnp.max(kernel, axis=0)

    def at(factor):
        if symmetric:
            return _symmetric_scale(factor * jnp.maximum(-low, high), levels)
        return _scale_and_zero_point(factor * low, factor * high, levels)

    def try_factor(best, factor):
        best_error, best_factor = best
        scale, zero_point = at(factor)
        error = range_error(kernel, scale, zero_point, levels)
        better = error < best_error
        return (jnp.where(better, error, best_error), jnp.where(better, factor, best_factor)), None

    start = (jnp.full_like(low, jnp.inf), jnp.ones_like(low))
    (_, factor), _ = jax.lax.scan(try_factor, start, jnp.asarray(_SHRINK, kernel.dtype))
    scale, zero_point = at(factor)
    return scale, None if symmetric else zero_point


def min_max_range(
    kernel: jax.Array, levels: jax.Array, symmetric: bool = False
) -> tuple[jax.Array, jax.Array | None]:
    """The range of every output channel's weights and of zero, whole: round-to-nearest's.

    Args:
        kernel: `[..., in, out]`.
        levels: `[...]`, 2^bits - 1.
        symmetric: a range around zero.

    Returns:
        scale and zero point (a whole number; None if symmetric), `[..., out]`.
    """
    low = jnp.minimum(jnp.min(kernel, axis=-2), 0.0)
    high = jnp.maximum(jnp.max(kernel, axis=-2), 0.0)
    levels = levels[..., None]
    if symmetric:
        return _symmetric_scale(jnp.maximum(-low, high), levels)[0], None
    scale = jnp.maximum((high - low) / levels, _SMALLEST_SCALE)
    return scale, jnp.round(-low / scale)


def _rounded(kernel, scale, zero_point):
    """Codes before the clamp, in the unsigned convention."""
    return jnp.round(kernel / scale + zero_point)


def quantize_weight(
    kernel: jax.Array, scale: jax.Array, zero_point: jax.Array | None, levels: jax.Array
) -> jax.Array:
    """Signed int8 codes `[in, out]` of a kernel; no gradient passes."""
    kernel, scale, zero_point = jax.lax.stop_gradient((kernel, scale, zero_point))
    codes = jnp.clip(_rounded(kernel, scale, _middle(zero_point, levels)), 0, levels)
    return (codes - signed_offset(levels)).astype(jnp.int8)


def dequantize_weight(
    codes: jax.Array, scale: jax.Array, zero_point: jax.Array | None, levels: jax.Array
) -> jax.Array:
    """The kernel `[in, out]` that signed codes stand for, in the scale's dtype."""
    if zero_point is None:
        return scale * codes.astype(scale.dtype)
    return dequantize(codes, scale, zero_point - signed_offset(levels))


@jax.custom_vjp
def fake_quantize_weight(
    kernel: jax.Array, scale: jax.Array, zero_point: jax.Array | None, levels: jax.Array
) -> jax.Array:
    """`scale * (clamp(round(kernel / scale + zero_point), 0, levels) - zero_point)`.

    Rounding is straight-through; a code equal to a bound counts as unclipped. The gradients of
    scale and zero point are multiplied by `1 / sqrt(in * levels)`, as LSQ does.
    """
    zero_point = _middle(zero_point, levels)
    codes = jnp.clip(_rounded(kernel, scale, zero_point), 0, levels)
    return scale * (codes - zero_point)


def _forward(kernel, scale, zero_point, levels):
    residuals = (kernel, scale, zero_point, levels)
    return fake_quantize_weight(*residuals), residuals


def _backward(residuals, cotangent):
    kernel, scale, given, levels = residuals
    zero_point = _middle(given, levels)
    unclamped = _rounded(kernel, scale, zero_point)
    codes = jnp.clip(unclamped, 0, levels)
    # Written by hand: at ties jnp.clip differentiates to 1/2 and lax.clamp to 0.
    inside = (unclamped >= 0) & (unclamped <= levels)
    d_kernel = jnp.where(inside, cotangent, 0)
    factor = 1 / jnp.sqrt(kernel.shape[0] * levels)
    d_codes = codes - zero_point - jnp.where(inside, kernel / scale, 0)
    d_scale = factor * jnp.sum(cotangent * d_codes, axis=0)
    d_zero_point = None
    if given is not None:
        d_zero_point = factor * jnp.sum(jnp.where(inside, 0, -cotangent) * scale, axis=0)
        d_zero_point = d_zero_point.astype(given.dtype)
    return (
        d_kernel.astype(kernel.dtype),
        d_scale.astype(scale.dtype),
        d_zero_point,
        jnp.zeros_like(levels),
    )


fake_quantize_weight.defvjp(_forward, _backward)
