"""Activations to integers: one scale and one integer zero point per token (QVGen, section 3)."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.reference import dequantize, signed_offset, wide_type

_SMALLEST_SCALE = 1e-9
_LAST_BITS = 8  # Units in the last place (of float32 for bfloat16) that count as the same value.


class QuantizedTokens(NamedTuple):
    """Tokens that are already quantized; a linear accepts them in place of an array.

    Attributes:
        codes: int8 `[..., in]`, `q - 2^(bits - 1)`.
        scale: float32 `[..., 1]`.
        zero_point: float32 `[..., 1]`, signed like the codes; an integer where it is a token's own,
            any number where it is learned.
        row_sum: float32 `[..., 1]`, the sum of the codes.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array
    row_sum: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def extreme(x: jax.Array, largest: bool) -> jax.Array:
    """The largest or smallest of every token `[..., in]`, as `[..., 1]`; ties share the gradient.

    As `jnp.max` and `jnp.min`, but its gradient arrives whatever the compiler does. Theirs looks
    for the value among x again and divides by how often it is there; where x is computed twice
    (rematerialised, or in two fusions) its last bits may differ, and it is there not once.
    """
    return (jnp.max if largest else jnp.min)(x, axis=-1, keepdims=True)


def _extreme_forward(x, largest):
    return extreme(x, largest), x


def _extreme_backward(largest, x, cotangent):
    return (share_among(x, extreme(x, largest), cotangent),)


extreme.defvjp(_extreme_forward, _extreme_backward)


def share_among(x: jax.Array, value: jax.Array, cotangent: jax.Array) -> jax.Array:
    """`cotangent [..., 1]` in equal parts where `x [..., in]` is `value [..., 1]`, else 0.

    But for the last bits, see `extreme`; an x that has none such gets zeros, and no NaN.
    """
    here = jnp.abs(x - value) <= _LAST_BITS * jnp.finfo(wide_type(x.dtype)).eps * jnp.abs(value)
    count = jnp.maximum(jnp.sum(here, axis=-1, keepdims=True, dtype=jnp.float32), 1)
    return jnp.where(here, cotangent / count, 0).astype(x.dtype)


def token_range(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """Scale and unsigned integer zero point of every token.

    Differentiable in x, lower and upper through the scale only, as the release is.

    Args:
        x: `[..., in]`, in the dtype that the range is to be computed in.
        lower: multiplier of the minimum, broadcastable to `[..., 1]`.
        upper: multiplier of the maximum, broadcastable to `[..., 1]`.
        levels: `[]`, 2^bits - 1.
        include_zero: widen the range to contain 0, so that 0 is represented exactly and a token far
            from 0 is not clipped to one end. The release does not.
        clip_ratio: a constant on top of both multipliers (the release: 0.95).

    Returns:
        scale and zero_point, both `[..., 1]`.
    """
    low, high = extreme(x, False), extreme(x, True)
    if include_zero:
        low, high = jnp.where(low > 0, 0, low), jnp.where(high < 0, 0, high)
    if clip_ratio != 1.0:
        low, high = low * clip_ratio, high * clip_ratio
    low, high = lower.astype(x.dtype) * low, upper.astype(x.dtype) * high
    levels = levels.astype(x.dtype)
    scale = (high - low) / levels
    # Not jnp.maximum: it halves the gradient at ties, and a NaN must reach the output.
    scale = jnp.where(scale < _SMALLEST_SCALE, jnp.asarray(_SMALLEST_SCALE, x.dtype), scale)
    zero_point = jax.lax.stop_gradient(jnp.clip(-jnp.round(low / scale), 0, levels))
    return scale, zero_point


def encode_tokens(
    x: jax.Array, scale: jax.Array, zero_point: jax.Array, levels: jax.Array
) -> QuantizedTokens:
    """Codes of `x [..., in]` for a given scale and unsigned zero point, both `[..., 1]`."""
    levels = levels.astype(x.dtype)
    offset = signed_offset(levels)
    codes = jnp.clip(jnp.round(x / scale) + zero_point, 0, levels) - offset
    row_sum = jnp.sum(codes, axis=-1, keepdims=True, dtype=wide_type(x.dtype))
    return QuantizedTokens(codes.astype(jnp.int8), scale, zero_point - offset, row_sum)


def quantize_tokens(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    range_dtype: jnp.dtype = jnp.float32,
) -> QuantizedTokens:
    """Quantizes every token of `x [..., in]` with its own scale and zero point.

    Args:
        x: `[..., in]`.
        lower: multiplier of each token's minimum, in (0, 1), broadcastable to `[..., 1]`.
        upper: the same for the maximum.
        levels: `[]`, 2^bits - 1, at most 255.
        include_zero: see `token_range`.
        clip_ratio: see `token_range`.
        range_dtype: what minimum, maximum, scale and division are computed in. The release takes
            the tensor's own dtype, bfloat16 included; codes at rounding boundaries depend on it.
    """
    x = x.astype(range_dtype)
    scale, zero_point = token_range(
        x, lower, upper, levels, include_zero=include_zero, clip_ratio=clip_ratio
    )
    return encode_tokens(x, scale, zero_point, levels)


def dequantize_tokens(tokens: QuantizedTokens) -> jax.Array:
    """The values that the codes stand for, `[..., in]` in the scale's dtype."""
    return dequantize(tokens.codes, tokens.scale, tokens.zero_point)
