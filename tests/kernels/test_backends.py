"""XLA and the interpreted TPU kernels on every inner size of the models, with tokens that hurt.

The same cases go through the Hopper kernel's and Triton's interpreters in tests/aot.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import tpu, xla
from kernels.layouts import LAYOUTS
from kernels.weight_only_matmul import weight_only_matmul
from tests.kernels.cases import (
    CASES,
    CLIPS,
    FOUR_BITS,
    assert_close,
    dequantized,
    hurtful_tokens,
    integer_tokens,
    levels,
    on_paper,
    real_tokens,
    roundings_of,
    weight_of,
)

INTERPRETED = {"out_dtype": jnp.float32, "interpret": True}


def layouts(bits):
    return [layout for layout in LAYOUTS if bits <= 4 or not layout.endswith("_halved")]


@pytest.mark.parametrize("case", FOUR_BITS, ids=str)
def test_integers_are_equal(case):
    tokens, weight = integer_tokens(case), weight_of(case, integers=True)
    expected = on_paper(tokens, weight)
    assert abs(expected).max() < 2**24  # So that float32 holds them all.
    for layout in LAYOUTS:
        y = xla.quantized_matmul(tokens, weight_of(case, layout, integers=True), layout=layout)
        np.testing.assert_array_equal(y, expected, err_msg=layout)
    y = tpu.quantized_matmul(tokens, weight, bits=case.bits, **INTERPRETED)
    np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_are_those_on_paper(case):
    x, tokens = real_tokens(case)
    weight = weight_of(case)
    expected, size = on_paper(tokens, weight), roundings_of(tokens, weight)
    assert_close(xla.quantized_matmul(tokens, weight), expected, size)
    y = tpu.quantized_matmul(tokens, weight, bits=case.bits, **INTERPRETED)
    assert_close(y, expected, size)
    y = tpu.quantize_and_matmul(
        x, *CLIPS, levels(case.act_bits), weight, bits=case.bits, **INTERPRETED
    )
    assert_close(y, expected, size)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packed_weights_times_floats_are_those_on_paper(case):
    x = hurtful_tokens(case.rows, case.inner)
    weight = weight_of(case)
    expected = np.float64(x) @ dequantized(weight) + np.float64(weight.bias)
    # Sums of floats round at every step; they are taken apart into codes and zero point.
    codes = abs(np.float64(weight.codes.astype(np.int8))) + abs(weight.zero_point)
    size = np.float64(abs(x)) @ codes * weight.scale + abs(weight.bias)
    for layout in layouts(case.weight_bits):
        y = weight_only_matmul(x, weight_of(case, layout), layout=layout, out_dtype=jnp.float32)
        assert_close(y, expected, size)
