"""The product of quantized tokens and quantized weights from one product of their codes."""

import jax
import jax.numpy as jnp

from kernels.quantize_tokens import QuantizedTokens
from kernels.reference import signed_offset

# What each product accumulates in. Codes of up to 8 bits are exact in all of them.
_ACCUMULATE = {
    "int8": jnp.int32,
    "bfloat16": jnp.float32,
    "float32": jnp.float32,
    "float64": jnp.float64,
}


def quantized_matmul(
    tokens: QuantizedTokens,
    codes: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    levels: jax.Array,
    bias: jax.Array | None = None,
    *,
    code_sum: jax.Array | None = None,
    product_dtype: jnp.dtype = jnp.int8,
    out_dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """`dequantized tokens @ dequantized weights + bias`, the scales outside the product.

    With signed codes A, W and signed zero points a, w the sum over the input axis of
    `(A - a) (W - w)` is `A @ W - a sum(W) - w sum(A) + in a w`; the three corrections are float32,
    because they cancel. The product of the codes is exact in every type, so that all product types
    give the same result as long as the accumulator is exact (float32: 4 bits up to in = 74 000).

    Args:
        tokens: codes `[..., in]` and their statistics.
        codes: `[in, out]`, signed, int8 or int4.
        scale: float32 `[out]`.
        zero_point: float32 `[out]`, real, in the unsigned convention; None for symmetric weights,
            whose signed zero point w is 0: two of the three corrections vanish.
        levels: float32 `[]`, 2^bits - 1 of the weights.
        bias: float32 `[out]` or None.
        code_sum: float32 `[out]`, the sum of the codes over the input axis if known beforehand.
        product_dtype: int8, bfloat16, float32 or float64 (which also widens the corrections).
        out_dtype: what the result is cast to at the very end.

    Returns:
        `[..., out]`.

    Raises:
        ValueError: product_dtype is none of the four.
    """
    product = jnp.dtype(product_dtype)
    if product.name not in _ACCUMULATE:
        raise ValueError(
            f"product_dtype={product.name!r}; expected one of {', '.join(_ACCUMULATE)}"
        )
    wide = jnp.float64 if product == jnp.float64 else jnp.float32
    # Through int8 always: XLA has no fast int4 product on CPU or GPU.
    w = codes.astype(jnp.int8)
    if code_sum is None:
        code_sum = jnp.sum(w, axis=0, dtype=jnp.int32)
    accumulated = jnp.matmul(
        tokens.codes.astype(product),
        w.astype(product),
        preferred_element_type=_ACCUMULATE[product.name],
    ).astype(wide)
    a = tokens.zero_point.astype(wide)
    centered = accumulated - a * code_sum.astype(wide)
    if zero_point is not None:
        w_zero = zero_point.astype(wide) - signed_offset(levels.astype(wide))
        centered = centered - w_zero * tokens.row_sum.astype(wide) + codes.shape[0] * a * w_zero
    y = tokens.scale.astype(wide) * scale.astype(wide) * centered
    if bias is not None:
        y = y + bias.astype(wide)
    return y.astype(out_dtype)
