"""The TPU kernels in interpret mode: the integers of the definition, whatever the shape."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import xla
from kernels.chips import named
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens, quantize_tokens
from kernels.reference import quantized_matmul_reference
from kernels.tpu import check, dot_dtype, quantize_and_matmul, quantized_matmul
from kernels.tpu_slots import count
from kernels.tpu_tiles import STRIP, VMEM, Tile, occupied, tiles

ONE = jnp.ones((), jnp.float32)
FLOAT32 = dict(out_dtype=jnp.float32, interpret=True)
# Rows, inner and columns that fill no tile; an odd inner axis; one token.
SHAPES = [(1, 256, 128), (100, 129, 200), (65, 64, 7)]


def levels(bits):
    return jnp.asarray(2**bits - 1, jnp.float32)


def codes_of(key, shape, bits):
    half = 2 ** (bits - 1)
    return jax.random.randint(jax.random.key(key), shape, -half, half, jnp.int8)


def weight_of(inner, columns, bits=4, integers=False):
    """A weight, with scales of 1 and integer zero points where its product is to be an integer."""
    codes = codes_of(bits, (inner, columns), bits)
    key = jax.random.key(7)
    scale = jnp.ones(columns) if integers else jax.random.uniform(key, (columns,), minval=0.1)
    zero_point = jax.random.uniform(key, (columns,), minval=-8, maxval=7)
    bias = jax.random.normal(key, (columns,))
    if integers:
        zero_point, bias = jnp.round(zero_point), jnp.round(9 * bias)
    code_sum = jnp.sum(codes, 0, dtype=jnp.int32).astype(jnp.float32)
    container = jnp.int4 if bits <= 4 else jnp.int8
    return Weight(codes.astype(container), scale, zero_point, code_sum, bias)


def tokens_of(rows, inner, bits=4):
    """Tokens whose values are integers."""
    codes = codes_of(rows, (rows, inner), bits)
    zero_point = jnp.round(jax.random.uniform(jax.random.key(1), (rows, 1), minval=-8, maxval=7))
    row_sum = jnp.sum(codes, 1, keepdims=True, dtype=jnp.int32).astype(jnp.float32)
    return QuantizedTokens(codes, jnp.ones((rows, 1)), zero_point, row_sum)


def integer_product(tokens, weight):
    a = np.asarray(tokens.codes, np.int64) - np.asarray(tokens.zero_point, np.int64)
    w = np.asarray(weight.codes.astype(jnp.int8), np.int64)
    w = w - np.asarray(weight.zero_point, np.int64)
    return a @ w + np.asarray(weight.bias, np.int64)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_equal_the_definition(shape):
    tokens, weight = tokens_of(*shape[:2]), weight_of(*shape[1:], integers=True)
    y = quantized_matmul(tokens, weight, **FLOAT32)
    np.testing.assert_array_equal(y, integer_product(tokens, weight))


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(3, 3), (4, 8), (8, 8), (8, 4)])
def test_all_pairs_of_bits_have_exact_integers(weight_bits, act_bits):
    tokens, weight = tokens_of(70, 192, act_bits), weight_of(192, 130, weight_bits, integers=True)
    y = quantized_matmul(tokens, weight, bits=(weight_bits, act_bits), **FLOAT32)
    np.testing.assert_array_equal(y, integer_product(tokens, weight))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_the_float_units_of_tpu7x_give_the_same_integers(dtype):
    tokens, weight = tokens_of(9, 2048), weight_of(2048, 128, integers=True)
    y = quantized_matmul(tokens, weight, chip=named("tpu7x"), dtype=dtype, **FLOAT32)
    np.testing.assert_array_equal(y, integer_product(tokens, weight))


def test_blocks_and_slices_that_end_outside_change_nothing():
    tokens, weight = tokens_of(150, 256), weight_of(256, 600, integers=True)
    y = quantized_matmul(tokens, weight, tile=Tile(64, 512, 128), **FLOAT32)
    np.testing.assert_array_equal(y, integer_product(tokens, weight))


@pytest.mark.parametrize("inner", [1536, 13824])
def test_real_lengths_are_within_rounding_of_the_reference(inner):
    x = jax.random.normal(jax.random.key(2), (5, inner))
    tokens, weight = quantize_tokens(x, 0.9 * ONE, 0.9 * ONE, levels(4)), weight_of(inner, 128)
    expected = quantized_matmul_reference(
        *tokens[:3], weight.codes, weight.scale, weight.zero_point + 8, levels(4), weight.bias
    )
    y = quantized_matmul(tokens, weight, **FLOAT32)
    # Both round corrections that cancel: one part in 10^5 of the largest output.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


def test_without_zero_point_and_bias_bfloat16_rounds_what_xla_rounds():
    x = jax.random.normal(jax.random.key(3), (33, 512))
    tokens = quantize_tokens(x, ONE, ONE, levels(4))
    weight = weight_of(512, 256)._replace(zero_point=None, bias=None)
    y = quantized_matmul(tokens, weight, interpret=True)
    expected = xla.quantized_matmul(tokens, weight, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    # One rounding to bfloat16 of float32 numbers that may differ in the last place.
    np.testing.assert_allclose(np.float32(y), np.float32(expected), rtol=2**-7)


def hurtful_rows(inner):
    """Ordinary, zero, constant, one-sided and tiny rows, and outliers; more than one strip."""
    x = jax.random.normal(jax.random.key(4), (STRIP + 6, inner))
    x = x.at[0].set(0).at[1].set(5).at[2].set(-5).at[3].add(9).at[4].multiply(1e-12)
    return x.at[5, 3].set(3e4).at[6, 7].set(-1e30).at[7:9].set(jnp.round(x[7:9] * 2) / 2)


@pytest.mark.parametrize("inner", [128, 129])
@pytest.mark.parametrize(
    ("bits", "dtype", "include_zero", "clip_ratio"),
    [(4, "float32", True, 1.0), (4, "bfloat16", False, 0.95), (3, "float32", False, 1.0)],
)
def test_codes_of_the_prologue_are_those_of_quantize_tokens(
    inner, bits, dtype, include_zero, clip_ratio
):
    x = hurtful_rows(inner).astype(dtype)
    clips = jnp.linspace(0.5, 1, len(x))[:, None], 0.9 * ONE
    how = dict(include_zero=include_zero, clip_ratio=clip_ratio)
    expected = jax.jit(lambda x: dequantize_tokens(quantize_tokens(x, *clips, levels(bits), **how)))
    # The identity hands every value through: one product of two factors, rounded once.
    codes = jnp.eye(inner, dtype=jnp.int8).astype(jnp.int4)
    weight = Weight(codes, jnp.ones(inner), None, jnp.ones(inner))
    values = quantize_and_matmul(x, *clips, levels(bits), weight, bits=(4, bits), **how, **FLOAT32)
    np.testing.assert_array_equal(values, expected(x))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [(4, 4), (4, 8)])
def test_the_prologue_and_separate_tokens_give_the_same_product(shape, bits):
    x, weight = jax.random.normal(jax.random.key(5), shape[:2]), weight_of(*shape[1:])
    tokens = quantize_tokens(x, 0.9 * ONE, ONE, levels(bits[1]))
    expected = quantized_matmul(tokens, weight, bits=bits, **FLOAT32)
    y = quantize_and_matmul(x, 0.9 * ONE, ONE, levels(bits[1]), weight, bits=bits, **FLOAT32)
    # Row sums are integers in both; the float32 corrections may be fused differently.
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * float(abs(expected).max()))


def test_every_block_of_rows_is_quantized_anew_and_kept_for_all_columns():
    x, weight = jax.random.normal(jax.random.key(6), (150, 128)), weight_of(128, 300)
    x = x * jnp.linspace(1, 9, 150)[:, None]
    how = dict(levels=levels(4), weight=weight, **FLOAT32)
    y = quantize_and_matmul(x, ONE, ONE, tile=Tile(64, 128, 128), **how)
    expected = quantize_and_matmul(x, ONE, ONE, tile=Tile(192, 384, 384), **how)
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * float(abs(expected).max()))


@pytest.mark.parametrize("chip", VMEM)
@pytest.mark.parametrize("x_dtype", [None, "bfloat16", "float32"])
def test_tiles_of_real_products_fit_and_waste_little(chip, x_dtype):
    for dim, hidden in ((1536, 8960), (5120, 13824), (1920, 7680), (3072, 12288)):
        for inner, columns in ((dim, dim), (dim, hidden), (hidden, dim)):
            for rows in (32760, 75600, 17776):
                product = Product(rows, inner, columns)
                dtype = dot_dtype(product, named(chip))
                tile = tiles(product, chip, dtype, x_dtype)
                assert occupied(tile, product, dtype, x_dtype) < VMEM[chip]
                assert tile.rows % STRIP == tile.columns % 128 == tile.columns % tile.slice == 0
                blocks = -(-rows // tile.rows) * tile.rows * -(-columns // tile.columns)
                assert blocks * tile.columns <= 1.1 * rows * columns


def test_rows_that_do_not_fit_are_refused():
    product = Product(64, 2**20, 128)
    with pytest.raises(NotImplementedError, match=r"in=1048576 is too long"):
        tiles(product, "v5e", jnp.int4)


@pytest.mark.parametrize(
    ("bits", "inner", "chip", "dtype"),
    [
        ((4, 4), 13824, "v5e", "int4"),
        ((3, 3), 13824, "v6e", "int4"),
        ((4, 8), 13824, "v5p", "int8"),
        ((8, 8), 13824, "v6e", "int8"),
        ((4, 4), 13824, "tpu7x", "float8_e4m3fn"),
        ((4, 8), 13824, "tpu7x", "bfloat16"),
    ],
)
def test_each_chip_multiplies_in_the_smallest_type_that_is_exact(bits, inner, chip, dtype):
    assert dot_dtype(Product(None, inner, 128, *bits), named(chip)) == dtype


@pytest.mark.parametrize(
    ("product", "chip", "reason"),
    [
        (Product(64, 1536, 64, 8, 8), "tpu7x", r"exact at W8A8 up to in=1024, not 1536"),
        (Product(64, 2**18 + 1, 64), "tpu7x", r"exact at W4A4 up to in=262144"),
        (Product(64, 64, 64, 4, 9), "v5e", r"W4A9: expected 2 to 8 bits"),
        (Product(64, 64, 64, out_dtype=jnp.float16), "v5e", r"out_dtype=float16"),
        (Product(None, 2**21, 64), "v6e", r"too long"),
    ],
)
def test_what_a_chip_cannot_take_is_refused(product, chip, reason):
    with pytest.raises(NotImplementedError, match=reason):
        check(product, named(chip))


SCHEDULE = """
     0   :  { %v1 = vld [vmem:[%s0]] }
   0x1 LB: > { %s1 = sadd.s32 1, %s0 /* iteration index, stage = 1 */ }
   0x2   : > { %5 = dma.hbm_to_vmem [thread:$0] /* 
iteration_bounds: (32, 5)
strides: (8, 40, 4) */ }
   0x3 LB: >> { %v2 = vadd.s32 %v1, %v1  ;;  %p1 = scmp.ge.s32.totalorder %s3, 16 /* loop exit test */ }
   0x4 LB: >> { %v3 = vmatmul.mubr.s4.gmra.mxu0 %v2  ;;  %v4 = vmatmul.mubr.s4.gmra.mxu1 %v2 }
   0x5   : >> { %p2 = scmp.ge.s32.totalorder %s4, 2 /* loop exit test */ }
   0x6   : > { %v5 = vmatprep.mubr.s4.mxu0 %v2 }
   0x7 PF: > { %p3 = scmp.ge.s32.totalorder %s1, 162 /* loop exit test */ }
   0x8   :  { %v6 = vmatmul.s8.gmra.mxu0 %v2 }
"""  # noqa: E501


def test_slots_are_counted_times_the_trips_of_all_loops_around_them():
    slots = count(SCHEDULE)
    assert slots.opcodes == {"s8": 1, "s4": 2 * 2 * 160}
    assert slots.cycles == 2 + 4 * 160 + 2 * 2 * 160
    assert slots.prologue == 16


def test_a_loop_without_a_known_end_is_not_counted():
    with pytest.raises(ValueError, match="a loop of 160 steps ends at 7"):
        count(SCHEDULE.replace("162 /*", "7 /*"))
