"""One product of codes equals the product of what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import xla
from kernels.layouts import LAYOUTS, lay_out
from kernels.operands import Weight
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from kernels.quantized_matmul import quantized_matmul
from kernels.reference import quantized_matmul_reference


def product(tokens, weight, layout="rows", **how):
    """`quantized_matmul` of codes, scale, unsigned zero point, levels and bias."""
    codes, scale, zero_point, levels, bias = weight
    if zero_point is not None:
        zero_point = zero_point - (levels + 1) / 2
    code_sum = jnp.sum(codes.astype(jnp.int32), 0)
    if layout != "rows":
        codes = lay_out(codes, 4, layout)
    operand = Weight(codes, scale, zero_point, code_sum, bias)
    return quantized_matmul(tokens, operand, layout=layout, **how)


def operands(weight_bits, act_bits, shape=(3, 5), features=(37, 11), dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(weight_bits * 16 + act_bits), 5)
    x = jax.random.normal(keys[0], (*shape, features[0]), dtype)
    half = 2 ** (weight_bits - 1)
    codes = jax.random.randint(keys[1], features, -half, half, jnp.int8)
    scale = jax.random.uniform(keys[2], (features[1],), dtype, 0.01, 0.1)
    zero_point = jax.random.uniform(keys[3], (features[1],), dtype, 0, 2 * half - 1)
    bias = jax.random.normal(keys[4], (features[1],), dtype)
    one = jnp.asarray(0.95, dtype)
    tokens = quantize_tokens(
        x, one, one, jnp.asarray(2**act_bits - 1, jnp.float32), range_dtype=dtype
    )
    return tokens, (codes, scale, zero_point, jnp.asarray(2 * half - 1, jnp.float32), bias)


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(4, 4), (3, 3), (2, 8), (8, 8), (5, 6)])
def test_integer_product_equals_the_reference_in_float64(weight_bits, act_bits):
    with jax.enable_x64(True):
        tokens, weight = operands(weight_bits, act_bits, dtype=jnp.float64)
        y = product(tokens, weight, product_dtype="float64", out_dtype=jnp.float64)
        expected = quantized_matmul_reference(*tokens[:3], *weight)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-9 * float(abs(expected).max()))


@pytest.mark.parametrize("product_dtype", ["int8", "bfloat16", "float32"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_product_type_gives_the_same_bits(product_dtype, bits):
    tokens, weight = operands(bits, bits)
    y = product(tokens, weight, product_dtype=product_dtype)
    np.testing.assert_array_equal(y, product(tokens, weight, product_dtype="int8"))
    # Float32 corrections cancel: one part in 10^5 of the largest output.
    expected = quantized_matmul_reference(*tokens[:3], *weight)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", [(37, 11), (64, 8)])
def test_every_layout_gives_the_same_bits(layout, features):
    tokens, weight = operands(4, 4, features=features)
    np.testing.assert_array_equal(product(tokens, weight, layout), product(tokens, weight))


def test_int4_codes_change_nothing():
    tokens, (codes, *rest) = operands(4, 4)
    np.testing.assert_array_equal(
        product(tokens, (codes.astype(jnp.int4), *rest)), product(tokens, (codes, *rest))
    )


def test_stacked_int4_codes_run_inside_a_scan():
    tokens, (codes, *rest) = operands(4, 4)
    stack = jnp.stack([codes, -codes - 1]).astype(jnp.int4)

    @jax.jit
    def run(stack):
        return jax.lax.scan(lambda c, w: (c, product(tokens, (w, *rest))), 0, stack)[1]

    expected = product(tokens, (-codes - 1, *rest))
    np.testing.assert_allclose(run(stack)[1], expected, rtol=1e-5, atol=1e-4)


def test_an_unknown_product_type_is_refused():
    tokens, weight = operands(4, 4)
    with pytest.raises(ValueError, match=r"float16.*expected one of int8"):
        product(tokens, weight, product_dtype="float16")


def test_symmetric_weights_need_one_correction_less():
    tokens, (codes, scale, _, levels, bias) = operands(4, 4)
    found = product(tokens, (codes, scale, None, levels, bias))
    middle = jnp.full_like(scale, 8)
    # The two vanishing corrections are zeros: not even the rounding differs.
    np.testing.assert_array_equal(found, product(tokens, (codes, scale, middle, levels, bias)))


def test_sums_longer_than_int32_holds_are_added_in_parts():
    inner = 140_000
    codes = np.full((1, inner), -128, np.int8)
    ones = jnp.ones((1, 1), jnp.float32)
    tokens = QuantizedTokens(codes, ones, 0 * ones, codes.sum(-1, keepdims=True, dtype=np.float32))
    weight = Weight(codes.T, ones[0], None, codes.sum(dtype=np.float32)[None])
    np.testing.assert_allclose(xla.quantized_matmul(tokens, weight), 128.0**2 * inner, rtol=1e-6)
