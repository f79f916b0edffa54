"""The Triton programs in Triton's interpreter, numpy on the host, against the definitions.

Triton decides when it is imported whether it compiles or interprets, so that these run in a process
of their own.
"""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import choose, fused_quantize, triton_matmul, triton_quantize
from kernels import quantized_matmul as dispatch
from kernels.chips import CHIPS
from kernels.layouts import lay_out
from kernels.low_rank import LowRank
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.quantize_tokens import quantize_tokens as quantize_tokens_definition
from kernels.target import building_for
from kernels.triton_matmul import Tile, layout, quantized_matmul
from kernels.triton_quantize import Clip, quantize_gelu, quantize_normalized, quantize_tokens
from kernels.xla import quantized_matmul as definition
from tests.kernels.cases import CASES, CLIPS, levels, real_tokens
from tests.kernels.cases import weight_of as weight_of_case

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def interpret():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("JAX_PLATFORMS", "cpu")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            yield lambda f, *args, **options: pool.submit(
                f, *args, **options, interpret=True
            ).result()


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def tokens_of(rows, inner, bits, seed=0):
    """Random tokens; the first is zero, the last constant, one has an outlier."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inner)).astype(np.float32)
    x[rows // 2, inner // 3] = 300.0
    if rows > 1:
        x[0], x[-1] = 0.0, 1.5
    levels = np.float32(2**bits - 1)
    return x, to_numpy(quantize_tokens_definition(x, np.float32(0.9), np.float32(0.8), levels))


def weight_of(inner, columns, bits, *, asymmetric=True, bias=True, seed=1):
    """Random codes with one column of zeros and one at each end; as Triton and XLA keep them."""
    rng = np.random.default_rng(seed)
    half = 2 ** (bits - 1)
    codes = rng.integers(-half, half, (inner, columns)).astype(np.int8)
    codes[:, 0], codes[:, 1], codes[:, 2] = 0, -half, half - 1
    scale = rng.uniform(0.01, 0.1, columns).astype(np.float32)
    zero = rng.uniform(0, 2 * half - 1, columns).astype(np.float32) if asymmetric else None
    b = rng.standard_normal(columns).astype(np.float32) if bias else None
    plain = Weight(
        codes,
        scale,
        None if zero is None else zero - np.float32(half),
        codes.sum(0, dtype=np.int32).astype(np.float32),
        b,
    )
    laid_out = lay_out(codes, bits, layout(Product(None, inner, columns, bits)))
    return plain._replace(codes=np.ascontiguousarray(laid_out)), plain


@pytest.mark.parametrize(
    ("rows", "inner", "columns", "weight_bits", "act_bits"),
    [
        (33, 129, 200, 4, 4),
        (130, 96, 200, 3, 3),
        (130, 129, 64, 8, 8),
        (33, 1536, 200, 4, 8),
        (2, 1, 64, 4, 4),
    ],
)
def test_the_product_has_the_definitions_bits(
    interpret, rows, inner, columns, weight_bits, act_bits
):
    _, tokens = tokens_of(rows, inner, act_bits)
    weight, plain = weight_of(inner, columns, weight_bits)
    y = interpret(quantized_matmul, tokens, weight, out_dtype=jnp.float32)
    # Integers are exact and the float32 corrections are made in the same order.
    np.testing.assert_array_equal(y, definition(tokens, plain))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_inner_sizes_and_tokens_that_hurt_have_the_definitions_bits(interpret, case):
    x, tokens = real_tokens(case)
    how = {"out_dtype": jnp.float32, "bits": case.bits}
    laid = layout(Product(None, case.inner, case.columns, *case.bits))
    y = interpret(quantized_matmul, tokens, to_numpy(weight_of_case(case, laid)), **how)
    np.testing.assert_array_equal(y, definition(tokens, weight_of_case(case)))
    # The tokens that hurt, which are the first nine, quantized by the program itself.
    found = interpret(quantize_tokens, x[:9], *CLIPS, levels(case.act_bits))
    expected = ieee_quantize(x[:9], *CLIPS, case.act_bits)
    jax.tree.map(np.testing.assert_array_equal, tuple(found), expected)


@pytest.mark.parametrize("tile", [Tile(256, 128, 64, 8, 3), Tile(16, 64, 32, 4, 4)])
def test_the_tile_changes_nothing(interpret, tile):
    _, tokens = tokens_of(300, 130, 4)
    weight, plain = weight_of(130, 300, 4)
    y = interpret(quantized_matmul, tokens, weight, out_dtype=jnp.float32, tile=tile)
    np.testing.assert_array_equal(y, definition(tokens, plain))


@pytest.mark.parametrize(("asymmetric", "bias"), [(False, True), (True, False), (False, False)])
def test_absent_operands_leave_their_terms_out(interpret, asymmetric, bias):
    _, tokens = tokens_of(5, 96, 4)
    weight, plain = weight_of(96, 64, 4, asymmetric=asymmetric, bias=bias)
    y = interpret(quantized_matmul, tokens, weight, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, definition(tokens, plain))


def test_eight_bit_tokens_at_their_ends_do_not_overflow_at_the_largest_inner(interpret):
    inner, columns = 13824, 64
    ones = np.ones((1, 1), np.float32)
    tokens = QuantizedTokens(
        np.full((1, inner), -128, np.int8), ones, 0 * ones, -128.0 * inner * ones
    )
    weight, plain = weight_of(inner, columns, 4, asymmetric=False, bias=False)
    y = interpret(quantized_matmul, tokens, weight, out_dtype=jnp.float32)
    np.testing.assert_array_equal(y, definition(tokens, plain))
    assert y[0, 1] == np.float32(128 * 8 * inner) * plain.scale[1]


def test_bfloat16_is_the_float32_result_rounded_once(interpret):
    _, tokens = tokens_of(33, 96, 4)
    weight, plain = weight_of(96, 64, 4)
    y = np.asarray(interpret(quantized_matmul, tokens, weight, out_dtype=jnp.bfloat16))
    expected = np.asarray(definition(tokens, plain))
    # The interpreter truncates where the chip rounds: one bfloat16 step, 2^-7.
    np.testing.assert_allclose(y.astype(np.float32), expected, rtol=2**-7)


def test_a_low_rank_term_is_added(interpret):
    _, tokens = tokens_of(33, 96, 4)
    weight, plain = weight_of(96, 64, 4)
    rng = np.random.default_rng(3)
    hidden, left = (rng.standard_normal((n, 24)).astype(np.float32) for n in (33, 64))
    y = interpret(quantized_matmul, tokens, weight, out_dtype=jnp.float32, low_rank=(hidden, left))
    expected = np.asarray(definition(tokens, plain)) + hidden @ left.T
    np.testing.assert_allclose(y, expected, rtol=0, atol=2e-6 * abs(expected).max())


def ieee_quantize(x, lower, upper, bits, *, include_zero=True, clip_ratio=1.0):
    """The definition in numpy, whose float32 division is IEEE's; XLA's may be a product."""
    f = np.float32
    levels, offset = f(2**bits - 1), f(2 ** (bits - 1))
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    if include_zero:
        low, high = np.minimum(low, f(0)), np.maximum(high, f(0))
    if clip_ratio != 1.0:
        low, high = low * f(clip_ratio), high * f(clip_ratio)
    low, high = f(lower) * low, f(upper) * high
    scale = (high - low) / levels
    scale = np.where(scale < f(1e-9), f(1e-9), scale)
    zero = np.clip(-np.round(low / scale), 0, levels)
    codes = np.clip(np.round(x / scale) + zero, 0, levels) - offset
    return codes.astype(np.int8), scale, zero - offset, codes.sum(-1, keepdims=True)


@pytest.mark.parametrize(
    ("inner", "bits", "options"),
    [
        (96, 4, {}),
        (129, 3, {}),
        (129, 4, {"include_zero": False, "clip_ratio": 0.95}),
    ],
)
def test_codes_and_statistics_are_ieees(interpret, inner, bits, options):
    x, _ = tokens_of(4, inner, bits)
    x[1] = np.round(x[1] * 2) / 2  # Ties.
    levels = np.float32(2**bits - 1)
    lower, upper = np.float32(0.9), np.float32(0.8)
    found = interpret(quantize_tokens, x, lower, upper, levels, **options)
    for a, b in zip(found, ieee_quantize(x, 0.9, 0.8, bits, **options), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = quantize_tokens_definition(x, lower, upper, levels, **options)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=2e-7)
    # A scale that differs in its last bit moves a tie by one code.
    assert abs(np.asarray(found.codes, np.int32) - expected.codes).max() <= 1


def test_ties_go_to_the_even_step(interpret):
    # The range is -8 to 7 and the scale 1, so that every second value is a tie.
    x = np.arange(-8, 7.5, 0.5, dtype=np.float32)[None]
    one = np.float32(1)
    found = interpret(quantize_tokens, x, one, one, np.float32(15))
    np.testing.assert_array_equal(found.codes, np.round(x))
    np.testing.assert_array_equal(found.scale, 1)


def test_a_nan_reaches_the_scale(interpret):
    x = np.ones((2, 300), np.float32)
    x[1, 7] = np.nan
    ratio = np.float32(1)
    scale = interpret(quantize_tokens, x, ratio, ratio, np.float32(15)).scale
    np.testing.assert_array_equal(np.isnan(scale[:, 0]), [False, True])


def assert_same_but_for_ties(found, values, clip, levels):
    """The norm's sums are in another order: scales to 1e-5, one code in 500 off by one."""
    expected = quantize_tokens_definition(jnp.asarray(values), *clip, levels)
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-5, atol=1e-9)
    off = abs(np.asarray(found.codes, np.int32) - np.asarray(expected.codes, np.int32))
    assert off.max() <= 1
    assert off.mean() <= 2e-3
    np.testing.assert_array_equal(found.row_sum[:, 0], np.asarray(found.codes, np.int32).sum(1))


@pytest.mark.parametrize("leading", [0, 2])
def test_one_norm_gives_the_codes_of_three_clips(interpret, leading):
    rows, inner, batch, eps = 10, 300, 2, 1e-6
    rng = np.random.default_rng(5)
    x = (3 * rng.standard_normal((rows, inner)) + 1).astype(np.float32)
    weight, bias = (rng.standard_normal(inner).astype(np.float32) for _ in range(2))
    groups = batch * 2 if leading else batch
    scale, shift = (rng.standard_normal((groups, inner)).astype(np.float32) for _ in range(2))
    clips = [Clip(np.float32(a), np.float32(b)) for a, b in ((0.9, 0.8), (0.7, 0.95), (1.0, 0.6))]
    levels = np.float32(15)
    found = interpret(
        quantize_normalized,
        x,
        clips,
        levels,
        eps=eps,
        weight=weight,
        bias=bias,
        scale=scale,
        shift=shift,
        rows_per_batch=5,
        leading_rows=leading,
    )
    group = np.repeat(np.arange(batch), 5)
    if leading:
        group = 2 * group + (np.tile(np.arange(5), batch) >= leading)
    centred = x - x.mean(1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(1, keepdims=True) + np.float32(eps))
    y = (y * weight + bias) * (1 + scale[group]) + shift[group]
    for tokens, clip in zip(found, clips, strict=True):
        assert_same_but_for_ties(tokens, y, clip, levels)


def test_a_norm_without_parameters_and_a_gelu_are_the_models(interpret):
    x = np.random.default_rng(6).standard_normal((3, 1536)).astype(np.float32) * 2
    clip, levels = Clip(np.float32(0.9), np.float32(0.8)), np.float32(15)
    (found,) = interpret(quantize_normalized, x, [clip], levels, eps=1e-6)
    centred = x - x.mean(1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(1, keepdims=True) + np.float32(1e-6))
    assert_same_but_for_ties(found, y, clip, levels)
    found = interpret(quantize_gelu, x, *clip, levels)
    assert_same_but_for_ties(found, jax.nn.gelu(x, approximate=True), clip, levels)


def publicly(function, *arguments, interpret, **options):
    """A public function in the interpreter's process, which is to run one program and no XLA."""
    launched = []

    def interpreted(kernel, *operands, **how):
        launched.append(kernel.__name__)
        return kernel(*operands, interpret=interpret, **how)

    kernels = [(triton_matmul, "quantized_matmul")]
    kernels += [(triton_quantize, f"quantize_{kind}") for kind in ("several", "normalized", "gelu")]
    with pytest.MonkeyPatch.context() as patch:
        for where, kernel in kernels:
            patch.setattr(where, kernel, partial(interpreted, getattr(where, kernel)))
        with building_for(CHIPS["a100"]):
            found = function(*arguments, backend="triton", **options)
    assert launched == [function.__name__]
    assert not choose._said
    return to_numpy(found)


SAMPLES, TOKENS = 2, 9


def sample_clips(count):
    """Of each linear, one pair for each sample; all of them different."""
    ends = np.linspace(0.4, 1, 2 * count * SAMPLES, dtype=np.float32)
    return [tuple(pair.reshape(2, SAMPLES, 1, 1)) for pair in ends.reshape(count, -1)]


def flat_clip(pair):
    return [np.repeat(end, TOKENS, axis=1).reshape(-1, 1) for end in pair]


def flat(tokens):
    """As rows, whose leading axes had to come back."""
    assert tokens.codes.shape[:2] == tokens.scale.shape[:2] == (SAMPLES, TOKENS)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, leaf.shape[-1]), tokens)


def test_the_public_quantizer_gives_each_linear_and_sample_its_own_clips(interpret):
    x = tokens_of(SAMPLES * TOKENS, 129, 4)[0].reshape(SAMPLES, TOKENS, 129)
    levels, how = np.float32(15), {"include_zero": False, "clip_ratio": 0.95}
    clips = sample_clips(3)
    found = interpret(publicly, fused_quantize.quantize_several, x, clips, levels, **how)
    for tokens, pair in zip(found, clips, strict=True):
        expected = ieee_quantize(x.reshape(-1, 129), *flat_clip(pair), 4, **how)
        jax.tree.map(np.testing.assert_array_equal, tuple(flat(tokens)), expected)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize(("modulated", "leading_rows"), [(False, 0), (True, 0), (True, 2)])
def test_the_public_norm_puts_every_operand_in_its_place(
    interpret, affine, modulated, leading_rows
):
    rng = np.random.default_rng(8)
    x = (3 * rng.standard_normal((SAMPLES, TOKENS, 300)) + 1).astype(np.float32)
    centred = x - x.mean(-1, keepdims=True)
    y = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(1e-5))
    operands = {"leading_rows": leading_rows}
    if affine:
        weight, bias = (rng.standard_normal(300).astype(np.float32) for _ in range(2))
        y, operands = y * weight + bias, operands | {"weight": weight, "bias": bias}
    if modulated:
        parts = (SAMPLES, 2 if leading_rows else 1, 300)
        scale, shift = (rng.standard_normal(parts).astype(np.float32) for _ in range(2))
        operands |= {"scale": scale, "shift": shift}
        part = (np.arange(TOKENS) >= leading_rows).astype(int) if leading_rows else [0] * TOKENS
        y = y * (1 + scale[:, part]) + shift[:, part]
    tokens = fused_quantize.Normalized(x, 1e-5, np.dtype(np.float32), **operands)
    clips, levels = sample_clips(3), np.float32(15)
    found = interpret(publicly, fused_quantize.quantize_normalized, tokens, clips, levels)
    for each, pair in zip(found, clips, strict=True):
        assert_same_but_for_ties(flat(each), y.reshape(-1, 300), flat_clip(pair), levels)


def test_the_public_gelu_takes_its_samples_clips(interpret):
    x = 2 * np.random.default_rng(9).standard_normal((SAMPLES, TOKENS, 300)).astype(np.float32)
    ((lower, upper),), levels = sample_clips(1), np.float32(15)
    found = interpret(publicly, fused_quantize.quantize_gelu, x, lower, upper, levels)
    value = jax.nn.gelu(x.reshape(-1, 300), approximate=True)
    assert_same_but_for_ties(flat(found), value, flat_clip((lower, upper)), levels)


def test_the_public_product_runs_the_program_on_flat_rows(interpret):
    _, tokens = tokens_of(SAMPLES * TOKENS, 129, 4)
    weight, plain = weight_of(129, 200, 4)
    samples = jax.tree.map(lambda leaf: leaf.reshape(SAMPLES, TOKENS, -1), tokens)
    how = {"layout": "columns_halved", "bits": (4, 4)}
    y = interpret(publicly, dispatch.quantized_matmul, samples, weight, **how)
    expected = np.asarray(definition(tokens, plain)).reshape(SAMPLES, TOKENS, 200)
    # As the program itself: the definition's bits.
    np.testing.assert_array_equal(y, expected)
    rng = np.random.default_rng(10)
    shapes = ((200, 24), (24, 129), (24,))
    branch = LowRank(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))
    y = interpret(publicly, dispatch.quantized_matmul, samples, weight, branch, **how)
    added = dispatch.quantized_matmul(samples, plain, branch, layout="rows")
    np.testing.assert_allclose(y, added, rtol=0, atol=2e-6 * abs(np.asarray(added)).max())
