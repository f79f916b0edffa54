"""The GPU's kernels on a GPU: the only place where their machine code runs.

    python -m pytest tests/kernels/test_on_gpu.py

Skipped where JAX has none. Products against float64 on paper, integers bit by bit, quantizers and
attention against their definitions.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_cudnn, attention_xla, triton_quantize
from kernels.attention_call import AttentionCall
from kernels.chips import chip_of
from kernels.choose import candidates, layout_of, module_of
from kernels.fused_quantize import Normalized, gelu, quantize_normalized
from kernels.layouts import lay_out
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from tests.kernels.cases import (
    CASES,
    CLIPS,
    FOUR_BITS,
    assert_close,
    hurtful_tokens,
    integer_tokens,
    levels,
    on_paper,
    real_tokens,
    roundings_of,
    weight_of,
)

DEVICE = jax.devices()[0]
pytestmark = pytest.mark.skipif(DEVICE.platform != "gpu", reason="JAX has no GPU here")
BACKENDS = [name for name in candidates(chip_of(DEVICE)) if name != "xla"]
# Inner and columns of Wan-14B, rows that fill no tile; and every kind of bits.
REAL = [
    (4100, 5120, 5120, 4, 4),
    (1000, 13824, 5120, 4, 4),
    (1000, 5120, 13824, 3, 3),
    (1000, 1536, 8960, 4, 8),
    (1000, 1920, 7680, 8, 8),
    (513, 8960, 1536, 4, 4),
]


def run(backend, tokens, weight, bits, out_dtype=jnp.float32):
    how = {"bits": bits, "out_dtype": out_dtype}
    return jax.jit(partial(module_of(backend).quantized_matmul, **how))(tokens, weight)


def laid(case, backend, **how):
    product = Product(case.rows, case.inner, case.columns, *case.bits, "float32")
    return weight_of(case, layout_of(backend, product, chip_of(DEVICE)), **how)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FOUR_BITS, ids=str)
def test_integers_are_equal(backend, case):
    tokens, weight = integer_tokens(case), laid(case, backend, integers=True)
    y = run(backend, tokens, weight, case.bits)
    np.testing.assert_array_equal(y, on_paper(tokens, weight_of(case, integers=True)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_on_paper(backend, case):
    _, tokens = real_tokens(case)
    plain = weight_of(case)
    y = run(backend, tokens, laid(case, backend), case.bits)
    assert_close(y, on_paper(tokens, plain), roundings_of(tokens, plain))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", REAL, ids=str)
def test_real_sizes_have_the_sums_of_integers(backend, size):
    rows, inner, columns, *bits = size
    keys = jax.random.split(jax.random.key(sum(size)), 4)
    halves = [2 ** (b - 1) for b in bits]
    codes = jax.random.randint(keys[0], (inner, columns), -halves[0], halves[0], jnp.int8)
    a = jax.random.randint(keys[1], (rows, inner), -halves[1], halves[1], jnp.int8)
    za = jax.random.randint(keys[2], (rows, 1), -halves[1], halves[1]).astype(jnp.float32)
    zw = jax.random.randint(keys[3], (columns,), -halves[0], halves[0]).astype(jnp.float32)
    tokens = QuantizedTokens(a, jnp.ones_like(za), za, a.sum(1, keepdims=True, dtype=jnp.float32))
    product = Product(rows, inner, columns, *bits, "float32")
    layout = layout_of(backend, product, chip_of(DEVICE))
    sums = codes.sum(0, dtype=jnp.float32)
    weight = Weight(
        lay_out(codes, bits[0], layout), jnp.ones_like(zw), zw, sums, jnp.zeros_like(zw)
    )
    y = run(backend, tokens, weight, tuple(bits))
    a, w = (np.asarray(x, np.float64) for x in (a, codes))
    expected = (a - np.asarray(za, np.float64)) @ (w - np.asarray(zw, np.float64))
    # Each term is an integer; float32 rounds those beyond 2^24, of which there are five.
    size = abs(a @ w) + abs(za * sums) + abs(a.sum(1, keepdims=True) * zw) + inner * abs(za * zw)
    assert_close(np.asarray(y), expected, np.maximum(np.asarray(size, np.float64), 1))
    rounded = run(backend, tokens, weight, tuple(bits), jnp.bfloat16)
    np.testing.assert_array_equal(rounded, y.astype(jnp.bfloat16))


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("inner", [129, 1536, 5120, 13824])
def test_codes_are_the_definitions(inner, bits):
    x = hurtful_tokens(19, inner)
    found = jax.jit(triton_quantize.quantize_tokens)(x, *CLIPS, levels(bits))
    with jax.default_device(jax.devices("cpu")[0]):
        expected = quantize_tokens(x, *CLIPS, levels(bits))
    assert_same_codes(found, expected, 1e-3)


def assert_same_codes(found, expected, share):
    """Equal but for a share of codes on a rounding boundary, which are one off."""
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-5)
    difference = abs(np.asarray(found.codes, np.int32) - np.asarray(expected.codes, np.int32))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= share
    sums = np.asarray(found.codes, np.int64).sum(-1, keepdims=True)
    np.testing.assert_array_equal(found.row_sum, sums)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("inner", [1536, 1920, 5120])
def test_the_norm_in_the_quantizer_is_the_norm_before_it(inner, dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (2, 300, inner), dtype)
    scale, shift = (0.5 * jax.random.normal(key, (2, 1, inner)) for key in keys[1:])
    tokens = Normalized(x, 1e-6, jnp.dtype(dtype), scale=scale, shift=shift)
    clips = [(jnp.float32(0.9), jnp.float32(0.8)), (jnp.float32(1), jnp.float32(0.7))]
    how = partial(quantize_normalized, tokens, clips, levels(4))
    found = jax.jit(lambda: how(backend="triton"))()
    expected = jax.jit(lambda: how(backend="xla"))()
    for a, b in zip(found, expected, strict=True):
        # A value that is rounded to bfloat16 the other way moves by up to a 128th.
        np.testing.assert_allclose(a.scale, b.scale, rtol=1e-5 if dtype == jnp.float32 else 2**-7)
        assert (np.asarray(a.codes) != np.asarray(b.codes)).mean() < 0.01


def test_gelu_in_the_quantizer_is_gelu_before_it():
    x = jax.random.normal(jax.random.key(0), (300, 8960), jnp.bfloat16)
    one = jnp.float32(1)
    found = jax.jit(triton_quantize.quantize_gelu)(x, one, one, levels(4))
    expected = jax.jit(lambda x: quantize_tokens(gelu(x), one, one, levels(4)))(x)
    assert (np.asarray(found.codes) != np.asarray(expected.codes)).mean() < 0.01


@pytest.mark.parametrize("shape", [(4097, 4097, 12, 128), (2000, 77, 5, 64), (513, 513, 3, 128)])
def test_cudnn_and_the_chunks_agree_forward_and_backward(shape):
    tokens, keys, heads, dim = shape
    draws = jax.random.split(jax.random.key(1), 4)
    q, k, v, g = (
        jax.random.normal(key, (1, n, heads, dim), jnp.bfloat16)
        for key, n in zip(draws, (tokens, keys, keys, tokens), strict=True)
    )
    attention_cudnn.check(AttentionCall(1, tokens, keys, heads, dim, jnp.dtype(jnp.bfloat16)))

    def both(function, *operands):
        y, pull = jax.vjp(function, *operands)
        return y, *pull(g.astype(y.dtype))

    found = jax.jit(lambda *x: both(attention_cudnn.attention, *x))(q, k, v)
    wide = [x.astype(jnp.float32) for x in (q, k, v)]
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(lambda *x: both(attention_xla.attention, *x))(*wide)
    for a, b in zip(found, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) < 0.01 * np.linalg.norm(b)  # bfloat16 has a 256th.
