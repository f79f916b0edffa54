"""The definition that every backend is tested against: dequantize both operands, then multiply."""

import jax
import jax.numpy as jnp


def at_least_float32(x: jax.Array) -> jax.Array:
    """`x` in float32, where norms, softmax, scales and sums live; float64 stays what it is.

    Programs are compared with each other in float64: there rounding does not hide a fault.
    """
    return x.astype(wide_type(x.dtype))


def wide_type(dtype: jnp.dtype) -> jnp.dtype:
    """float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def dequantize(codes: jax.Array, scale: jax.Array, zero_point: jax.Array) -> jax.Array:
    """`scale * (codes - zero_point)`, in the scale's dtype; zero point signed like the codes."""
    return scale * (codes.astype(scale.dtype) - zero_point)


def signed_offset(levels: jax.Array) -> jax.Array:
    """`2^(bits - 1)`: what separates unsigned codes `0..levels` from ours; levels = 2^bits - 1."""
    return (levels + 1) / 2


def quantized_matmul_reference(
    token_codes: jax.Array,
    token_scale: jax.Array,
    token_zero_point: jax.Array,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array,
    levels: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The product of two asymmetric operands, written as one would on paper.

    Args:
        token_codes: `[..., in]`, signed.
        token_scale: `[..., 1]`.
        token_zero_point: `[..., 1]`, signed like the codes.
        codes: `[in, out]`, signed.
        scale: `[out]`.
        zero_point: `[out]`, a real number in the unsigned convention (codes `0..levels`).
        levels: `[]`, 2^bits - 1 of the weights.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the scales' dtype.
    """
    x = dequantize(token_codes, token_scale, token_zero_point)
    w = dequantize(codes, scale, zero_point - signed_offset(levels))
    y = jnp.matmul(x, w, precision="highest")
    return y if bias is None else y + bias
