"""Activations quantized with learned steps: the range is a parameter, not a token's own.

Source: LSQ (arXiv 1902.08153, eq. 1 to 3 and section 2.2) for the step, LSQ+ (arXiv 2004.09576) for
the learned zero point beside it, EfficientDM (arXiv 2310.03270, eq. 9) for one of each per part of
the timesteps. Where the zero point is None, codes are symmetric about zero.
"""

import math

import jax
import jax.numpy as jnp

from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens
from kernels.reference import at_least_float32, signed_offset

_SMALLEST_STEP = 1e-6
# What the mean of |x| is to the standard deviation of a normal distribution.
_MEAN_OF_NORMAL = math.sqrt(2 / math.pi)


def initial_step(
    moments: jax.Array, levels: jax.Array, zero_point: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Where a layer's step starts: LSQ's `2 mean|x| / sqrt(Qp)` (section 2.1), Qp = 2^(b-1) - 1.

    With a zero point the same about the mean: the codes' middle is there, and `mean|x - mean|` is
    what a normal distribution of that variance has.

    Args:
        moments: `[..., 3]`, the means of |x|, x and x^2 over what the layer reads.
        levels: `[...]`, 2^bits - 1.
        zero_point: whether the layer learns one.

    Returns:
        step `[...]` and zero point (real, unsigned convention; None if symmetric) `[...]`.
    """
    size, mean, square = (moments[..., i].astype(jnp.float32) for i in range(3))
    if zero_point:
        size = _MEAN_OF_NORMAL * jnp.sqrt(jnp.maximum(square - mean**2, 0))
    step = jnp.maximum(2 * size / jnp.sqrt(_positive_codes(levels)), _SMALLEST_STEP)
    return step, signed_offset(levels) - mean / step if zero_point else None


def _positive_codes(levels: jax.Array) -> jax.Array:
    """LSQ's Qp of signed codes."""
    return (levels - 1) / 2


def encode_with_step(
    x: jax.Array, step: jax.Array, zero_point: jax.Array | None, levels: jax.Array
) -> QuantizedTokens:
    """`clamp(round(x / step + zero_point), 0, levels)` of tokens, in training and inference alike.

    Args:
        x: `[batch, ..., in]`.
        step: broadcastable to `[batch, ..., 1]`.
        zero_point: the same, a real number in the convention of unsigned codes, or None.
        levels: `[]`, 2^bits - 1.
    """
    x = at_least_float32(x)
    offset = signed_offset(levels).astype(x.dtype)
    zero = _zero(zero_point, levels).astype(x.dtype)
    codes = jnp.clip(jnp.round(x / step + zero), 0, levels) - offset
    row_sum = jnp.sum(codes, axis=-1, keepdims=True, dtype=x.dtype)
    per_token = (jnp.broadcast_to(each, row_sum.shape) for each in (step, zero - offset))
    return QuantizedTokens(codes.astype(jnp.int8), *per_token, row_sum)


def _zero(zero_point: jax.Array | None, levels: jax.Array) -> jax.Array:
    return signed_offset(levels) if zero_point is None else zero_point


@jax.custom_vjp
def _straight_through(
    x: jax.Array,
    step: jax.Array,
    zero_point: jax.Array | None,
    levels: jax.Array,
    tokens: QuantizedTokens,
) -> jax.Array:
    """The tokens' values; rounding differentiates as the identity, the clamp inclusively."""
    del step, zero_point, levels
    return dequantize_tokens(tokens).astype(x.dtype)


def _forward(x, step, zero_point, levels, tokens):
    return _straight_through(x, step, zero_point, levels, tokens), (x, step, zero_point, levels)


def _backward(residuals, cotangent):
    x, step, zero_point, levels = residuals
    wide, zero = x.astype(step.dtype), _zero(zero_point, levels)
    ratio = wide / step
    unclamped = jnp.round(ratio + zero)
    # Inclusive, as for weights: LSQ's eq. 3 already clips the half step beyond the last code.
    inside = (unclamped >= 0) & (unclamped <= levels)
    cotangent = cotangent.astype(step.dtype)
    # LSQ, section 2.2: Nf counts the features of one sample.
    codes = _positive_codes(levels) if zero_point is None else levels
    factor = 1 / jnp.sqrt(math.prod(x.shape[1:]) * codes)
    d_codes = jnp.clip(unclamped, 0, levels) - zero - jnp.where(inside, ratio, 0)
    d_step = factor * _summed_like(step, cotangent * d_codes)
    d_zero = None
    if zero_point is not None:
        d_zero = factor * _summed_like(zero_point, jnp.where(inside, 0, -cotangent) * step)
    return jnp.where(inside, cotangent, 0).astype(x.dtype), d_step, d_zero, None, None


def _summed_like(parameter: jax.Array, terms: jax.Array) -> jax.Array:
    """Over the axes along which the parameter, of the same rank, was broadcast."""
    axes = tuple(i for i, size in enumerate(parameter.shape) if size == 1)
    return jnp.sum(terms, axis=axes, keepdims=True).astype(parameter.dtype)


_straight_through.defvjp(_forward, _backward)


def fake_quantize_with_step(
    x: jax.Array, step: jax.Array, zero_point: jax.Array | None, levels: jax.Array
) -> tuple[jax.Array, QuantizedTokens]:
    """The tokens in integers, and their values as a differentiable function of x and the step.

    `d value / d step` is `code - x / step` where x is not clipped, else the bound it was clipped
    to (LSQ, eq. 3), times `1 / sqrt(Nf Qp)`. A zero point has a gradient where x is clipped.

    Args:
        x: `[batch, ..., in]`.
        step: float32 `[batch or 1, 1, ..., 1]`, of the rank of x.
        zero_point: the same, or None.
        levels: float32 `[]`, 2^bits - 1.

    Returns:
        values `[batch, ..., in]` in x's dtype, and the tokens (without gradient).
    """
    fixed = jax.lax.stop_gradient((x, step, zero_point))
    tokens = encode_with_step(*fixed, levels)
    return _straight_through(x, step, zero_point, levels, tokens), tokens
