"""Tokens to codes inside a TPU kernel: what `quantize_tokens` computes, in fewer instructions.

The matrix unit multiplies int4 so fast that the vector unit's share decides: of a row block of
Wan's smaller products, quantizing takes as long as several blocks of columns.
"""

import jax
import jax.numpy as jnp

from kernels.reference import signed_offset

# Around it float32 holds the integers and nothing between: adding it rounds, half to even.
_SHIFT = 1.5 * 2**23
_SMALLEST_SCALE = 1e-9  # Of `quantize_tokens`.


def strip_scalars(levels: jax.Array) -> jax.Array:
    """`[3]`: what `quantize_strip` needs beside the tokens, given `levels []`, 2^bits - 1.

    The shift is data: XLA would cancel a constant that is added and taken off again.
    """
    levels = jnp.asarray(levels, jnp.float32)
    return jnp.stack([levels, 1 / levels, jnp.float32(_SHIFT)])


def quantize_strip(
    x: jax.Array,
    clips: jax.Array,
    scalars: jax.Array,
    *,
    include_zero: bool,
    clip_ratio: float,
    padding: int,
) -> tuple[jax.Array, jax.Array]:
    """Codes of some rows and their statistics, in float32 as in `quantize_tokens`.

    Args:
        x: `[rows, in]`, of which the last `padding` columns repeat the one before them.
        clips: `[rows, 2]`, multipliers of minimum and maximum.
        scalars: of `strip_scalars`; may be a reference.
        include_zero, clip_ratio: see `kernels.quantize_tokens.token_range`.

    Returns:
        codes float32 `[rows, in]`, and `[rows, 3]`: scale, zero point, row sum.
    """
    levels, inverse, shift = scalars[0], scalars[1], scalars[2]
    x = x.astype(jnp.float32)
    # As `token_range`, but for its division by the scalar `levels`, of which XLA makes a product
    # with the inverse and Pallas does not.
    low, high = jnp.min(x, axis=1, keepdims=True), jnp.max(x, axis=1, keepdims=True)
    if include_zero:
        low, high = jnp.where(low > 0, 0, low), jnp.where(high < 0, 0, high)
    if clip_ratio != 1.0:
        low, high = low * clip_ratio, high * clip_ratio
    low, high = clips[:, :1] * low, clips[:, 1:] * high
    scale = (high - low) * inverse
    scale = jnp.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
    zero_point = jnp.clip(-jnp.round(low / scale), 0, levels)
    offset = signed_offset(levels)
    zero_point = zero_point - offset
    # Half to even, as jnp.round, in 2 instructions instead of 12. The clip comes first, which
    # changes nothing as its ends are integers, and keeps division and addition from being fused.
    clipped = jnp.clip(x / scale, -offset - zero_point, levels - offset - zero_point)
    codes = (clipped + shift) - (shift - zero_point)
    row_sum = jnp.sum(codes, axis=1, keepdims=True) - padding * codes[:, -1:]
    return codes, jnp.concatenate([scale, zero_point, row_sum], axis=1)
