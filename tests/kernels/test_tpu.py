"""The TPU kernels in interpret mode: the integers of the definition, whatever the shape."""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import xla
from kernels.chips import named
from kernels.layouts import lay_out
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens, quantize_tokens
from kernels.reference import quantized_matmul_reference
from kernels.tpu import check, dot_dtype, quantize_and_matmul, quantized_matmul
from kernels.tpu_tiles import STRIP, VMEM, Tile, occupied, tiles

ONE = np.float32(1)
FLOAT32 = dict(out_dtype=jnp.float32, interpret=True)
# Rows, inner and columns that fill no tile; an odd inner axis; one token.
SHAPES = [(1, 256, 128), (100, 129, 200), (65, 64, 7)]


def levels(bits):
    return np.float32(2**bits - 1)


def codes_of(seed, shape, bits):
    half = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, shape, np.int8)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def weight_of(inner, columns, bits=4, integers=False):
    """A weight, with scales of 1 and integer zero points where its product is to be an integer."""
    codes, draw = codes_of(bits, (inner, columns), bits), np.random.default_rng(7)
    scale, zero_point = draw.uniform(0.1, 1, columns), draw.uniform(-8, 7, columns)
    bias = draw.standard_normal(columns)
    if integers:
        scale, zero_point, bias = np.ones(columns), np.round(zero_point), np.round(9 * bias)
    rows = [np.float32(row) for row in (scale, zero_point, codes.sum(0, dtype=np.int64), bias)]
    return Weight(lay_out(codes, bits, "rows"), *rows)


def tokens_of(rows, inner, bits=4):
    """Tokens whose values are integers."""
    codes = codes_of(rows, (rows, inner), bits)
    zero_point = np.random.default_rng(1).integers(-8, 8, (rows, 1)).astype(np.float32)
    row_sum = codes.sum(1, keepdims=True, dtype=np.int64).astype(np.float32)
    return QuantizedTokens(codes, np.ones((rows, 1), np.float32), zero_point, row_sum)


def integer_product(tokens, weight):
    a = np.asarray(tokens.codes, np.int64) - np.asarray(tokens.zero_point, np.int64)
    w = weight.codes.astype(np.int64)
    w = w - np.asarray(weight.zero_point, np.int64)
    return a @ w + np.asarray(weight.bias, np.int64)


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_equal_the_definition(shape):
    tokens, weight = tokens_of(*shape[:2]), weight_of(*shape[1:], integers=True)
    y = quantized_matmul(tokens, weight, **FLOAT32)
    np.testing.assert_array_equal(y, integer_product(tokens, weight))


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(3, 3), (4, 8), (8, 8)])
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


def test_the_longest_real_rows_are_within_rounding_of_the_reference():
    inner = 13824
    x = normal(2, 5, inner)
    tokens, weight = quantize_tokens(x, ONE, ONE, levels(4)), weight_of(inner, 128)
    expected = quantized_matmul_reference(
        *tokens[:3], weight.codes, weight.scale, weight.zero_point + 8, levels(4), weight.bias
    )
    y = quantized_matmul(tokens, weight, **FLOAT32)
    # Both round corrections that cancel: one part in 10^5 of the largest output.
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


def test_without_zero_point_and_bias_bfloat16_rounds_what_xla_rounds():
    x = normal(3, 33, 512)
    tokens = quantize_tokens(x, ONE, ONE, levels(4))
    weight = weight_of(512, 256)._replace(zero_point=None, bias=None)
    y = quantized_matmul(tokens, weight, interpret=True)
    expected = xla.quantized_matmul(tokens, weight, out_dtype=jnp.bfloat16)
    assert y.dtype == jnp.bfloat16
    # One rounding to bfloat16 of float32 numbers that may differ in the last place.
    np.testing.assert_allclose(np.float32(y), np.float32(expected), rtol=2**-7)


def values_of_the_prologue(x, clips, bits, **how):
    """What the codes stand for: the identity hands them through, rounded once."""
    inner = x.shape[1]
    codes = lay_out(np.eye(inner, dtype=np.int8), 4, "rows")
    one = np.ones(inner, np.float32)
    weight = Weight(codes, one, None, one)
    return quantize_and_matmul(x, *clips, levels(bits), weight, bits=(4, bits), **how, **FLOAT32)


def hurtful_rows(inner):
    """Ordinary, zero, constant, one-sided and tiny rows, and outliers; more than one strip."""
    x = normal(4, STRIP + 6, inner)
    x[0], x[1], x[2], x[3], x[4] = 0, 5, -5, x[3] + 9, 1e-12 * x[4]
    # The last two lie at rounding boundaries.
    x[5, 3], x[6, 7], x[7:9] = 3e4, -1e30, np.round(2 * x[7:9]) / 2
    return x


@pytest.mark.parametrize(
    ("inner", "bits", "dtype", "include_zero", "clip_ratio"),
    [
        (128, 4, "float32", True, 1.0),
        (129, 4, "bfloat16", False, 0.5),
        (128, 3, "float32", False, 1.0),
    ],
)
def test_codes_of_the_prologue_are_those_of_quantize_tokens(
    inner, bits, dtype, include_zero, clip_ratio
):
    x = jnp.asarray(hurtful_rows(inner), dtype)
    # Powers of two: others may or may not be rounded before the subtraction, as the CPU likes.
    clips = np.float32(0.5) ** (np.arange(len(x)) % 2)[:, None], ONE
    how = dict(include_zero=include_zero, clip_ratio=clip_ratio)
    expected = dequantize_tokens(quantize_tokens(x, *clips, levels(bits), **how))
    np.testing.assert_array_equal(values_of_the_prologue(x, clips, bits, **how), expected)


def test_other_clips_move_the_scale_by_rounding_only():
    x, clips = hurtful_rows(128), (np.float32(0.9), np.linspace(0.7, 1, STRIP + 6)[:, None])
    clips = [np.float32(clip) for clip in clips]
    expected = dequantize_tokens(quantize_tokens(x, *clips, levels(4)))
    # A code more or less would be a fifteenth.
    np.testing.assert_allclose(values_of_the_prologue(x, clips, 4), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "bits"), [*((shape, (4, 4)) for shape in SHAPES), (SHAPES[1], (4, 8))]
)
def test_the_prologue_and_separate_tokens_give_the_same_product(shape, bits):
    x, weight = normal(5, *shape[:2]), weight_of(*shape[1:])
    tokens = quantize_tokens(x, ONE, ONE, levels(bits[1]))
    expected = xla.quantized_matmul(tokens, weight)
    y = quantize_and_matmul(x, ONE, ONE, levels(bits[1]), weight, bits=bits, **FLOAT32)
    # Row sums are integers in both; the float32 corrections may be fused differently.
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * float(abs(expected).max()))


def test_every_block_of_rows_is_quantized_anew_and_kept_for_all_columns():
    x, weight = normal(6, 150, 128) * np.linspace(1, 9, 150)[:, None], weight_of(128, 300)
    x = np.float32(x)
    expected = xla.quantized_matmul(quantize_tokens(x, ONE, ONE, levels(4)), weight)
    y = quantize_and_matmul(x, ONE, ONE, levels(4), weight, tile=Tile(64, 128, 128), **FLOAT32)
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
