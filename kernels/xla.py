"""The product of codes through XLA's own dot: every device, every layout, every number of bits.

Never a dot of int4: XLA makes an elementwise product of it on GPU and none at all on CPU. Codes go
through int8, for which all of them have a dot.
"""

import math

import jax
import jax.numpy as jnp

from kernels.chips import Chip
from kernels.layouts import halves, unlay
from kernels.operands import LONGEST_INT32_SUM, Product, Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.target import target

# What each product accumulates in. Codes of up to 8 bits are exact in all of them.
_ACCUMULATE = {
    "int8": jnp.int32,
    "bfloat16": jnp.float32,
    "float32": jnp.float32,
    "float64": jnp.float64,
}


def layout(product: Product, platform: str) -> str:
    """How XLA keeps weights: two codes a byte where it stores an int4 in a whole one."""
    return "rows_halved" if platform == "cpu" and product.weight_bits <= 4 else "rows"


def check(product: Product, chip: Chip | None = None) -> None:
    """Takes everything."""
    del product, chip


def wide_dtype(product_dtype: jnp.dtype) -> jnp.dtype:
    """What corrections are computed in, and a weight's signed zero point is to be given in."""
    return jnp.float64 if jnp.dtype(product_dtype) == jnp.float64 else jnp.float32


def quantized_matmul(
    tokens: QuantizedTokens,
    weight: Weight,
    *,
    layout: str = "rows",
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
        weight: see `Weight`.
        layout: of the weight's codes, see `kernels.layouts`.
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
    wide = wide_dtype(product)
    accumulated = _product_of_codes(tokens.codes, weight.codes, layout, product).astype(wide)
    a = tokens.zero_point.astype(wide)
    centered = accumulated - a * weight.code_sum.astype(wide)
    if weight.zero_point is not None:
        w, inner = weight.zero_point.astype(wide), tokens.codes.shape[-1]
        centered = centered - w * tokens.row_sum.astype(wide) + inner * a * w
    y = tokens.scale.astype(wide) * weight.scale.astype(wide) * centered
    if weight.bias is not None:
        y = y + weight.bias.astype(wide)
    return y.astype(out_dtype)


def _product_of_codes(
    tokens: jax.Array, codes: jax.Array, layout: str, product: jnp.dtype
) -> jax.Array:
    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        accumulate = _ACCUMULATE[product.name]
        left, right = left.astype(product), right.astype(jnp.int8).astype(product)
        return jnp.matmul(left, right, preferred_element_type=accumulate)

    inner = tokens.shape[-1]
    if layout != "rows_halved":
        if _as_floats(tokens, codes) and product.name == "int8":
            product = jnp.dtype(jnp.float32)
        codes = unlay(codes, inner, layout)
        if product.name != "int8" or inner <= LONGEST_INT32_SUM:
            return dot(tokens, codes)
        # Sums of 8-bit codes that long may leave int32: parts of them are added in float32.
        most = LONGEST_INT32_SUM
        parts = [dot(tokens[..., i : i + most], codes[i : i + most]) for i in range(0, inner, most)]
        return sum(part.astype(jnp.float32) for part in parts)
    # Two products of half the size: the codes are never side by side in memory.
    low, high = halves(codes)
    half = len(low)
    return dot(tokens[..., :half], low) + dot(tokens[..., half:], high[: inner - half])


def _as_floats(tokens: jax.Array, codes: jax.Array) -> bool:
    """Whether a GPU has to multiply int4 weights by one token in float32, which is as exact.

    XLA makes a sum of products of such a dot, and its Triton emitter does not compile the way from
    int4 to int32 there (jax 0.11.2). Exact up to 16384 inputs, beyond which no model goes.
    """
    one = math.prod(tokens.shape[:-1]) == 1
    return one and codes.dtype == jnp.int4 and target().platform == "gpu"
