"""A product of codes with the gradient of fake quantization: training runs what inference runs."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.low_rank import kernel_gradient
from kernels.operands import Weight
from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens
from kernels.quantized_matmul import quantized_matmul
from kernels.reference import signed_offset, wide_type
from kernels.xla import wide_dtype
from qvgen_jax.quant.weights import dequantize_weight


class QuantizedWeight(NamedTuple):
    """A kernel in integers: signed codes `[in, out]`, scale and zero point `[out]`, levels `[]`.

    The zero point is None for symmetric weights.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    levels: jax.Array


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def codes_matmul(
    values: jax.Array,
    kernel: jax.Array,
    tokens: QuantizedTokens,
    weight: QuantizedWeight,
    product_dtype: jnp.dtype,
) -> jax.Array:
    """`quantized_matmul(tokens, weight)`, differentiated as `values @ kernel`.

    `values` and `kernel` are the fake-quantized operands: they only receive the gradient. Nothing
    reads their own values, so the compiler never materialises them; the backward pass rebuilds them
    from the codes, in the dtype of `values`.

    Args:
        values: `[..., in]`, what the tokens stand for, in the compute dtype.
        kernel: `[in, out]`, what the weight stands for.
        tokens: the integers of `values`.
        weight: the integers of `kernel`.
        product_dtype: see `quantized_matmul`.

    Returns:
        float32 `[..., out]` (float64 for a float64 product).
    """
    del values, kernel
    return _product(tokens, weight, product_dtype)


def _product(tokens, weight, product_dtype):
    wide = wide_dtype(product_dtype)
    zero_point = signed_zero_point(weight.zero_point, weight.levels, wide)
    code_sum = jnp.sum(weight.codes, axis=0, dtype=jnp.int32)
    operand = Weight(weight.codes, weight.scale, zero_point, code_sum)
    return quantized_matmul(tokens, operand, product_dtype=product_dtype, out_dtype=wide)


def signed_zero_point(
    zero_point: jax.Array | None, levels: jax.Array, wide: jnp.dtype
) -> jax.Array | None:
    """A weight's zero point `[out]` in the convention of its signed codes; None stays None."""
    if zero_point is None:
        return None
    return zero_point.astype(wide) - signed_offset(levels.astype(wide))


def _forward(values, kernel, tokens, weight, product_dtype):
    # Empty arrays carry the dtypes the gradients must have, at no cost.
    like = jnp.zeros((0,), values.dtype), jnp.zeros((0,), kernel.dtype)
    return _product(tokens, weight, product_dtype), (tokens, weight, like)


def _backward(product_dtype, residuals, cotangent):
    del product_dtype
    tokens, weight, (like_values, like_kernel) = residuals
    compute = like_values.dtype
    cotangent = cotangent.astype(compute)
    values = dequantize_tokens(tokens).astype(compute)
    kernel = dequantize_weight(*weight).astype(compute)
    accumulate = wide_type(compute)
    d_values = jnp.matmul(cotangent, kernel.T, preferred_element_type=accumulate)
    d_kernel = kernel_gradient(values, cotangent)
    return d_values.astype(compute), d_kernel.astype(like_kernel.dtype), None, None


codes_matmul.defvjp(_forward, _backward)
