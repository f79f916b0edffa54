"""What every backend is tested on: the inner sizes of real models, and tokens that hurt.

Few rows and columns, because the inner axis is what blocks, steps and sums depend on.
"""

from typing import NamedTuple

import numpy as np

from kernels.layouts import lay_out
from kernels.operands import Weight
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from kernels.shapes import INNERS


class Case(NamedTuple):
    """A product; of more than ten rows some are the hurtful ones of `hurtful_tokens`."""

    rows: int
    inner: int
    columns: int
    weight_bits: int = 4
    act_bits: int = 4

    @property
    def bits(self) -> tuple[int, int]:
        return self.weight_bits, self.act_bits

    def __str__(self) -> str:
        return f"{self.rows}x{self.inner}x{self.columns}-W{self.weight_bits}A{self.act_bits}"


# 19 rows fill no tile, 70 one and a bit; 129 and 1537 fill no block of the inner axis.
CASES = (
    *(Case(19, inner, 64) for inner in INNERS),
    Case(1, 13824, 64),
    Case(1, 129, 72),
    Case(70, 129, 72),
    Case(19, 1537, 64),
    *(Case(19, 13824, 64, *bits) for bits in ((3, 3), (4, 8), (8, 8))),
)
FOUR_BITS = tuple(case for case in CASES if max(case.bits) <= 4)

# Eight roundings of float32, of numbers as large as those that `roundings_of` adds up.
ROUNDINGS = 8 * 2.0**-24
# Powers of two: others may or may not be rounded before the subtraction, as the compiler likes.
CLIPS = (np.float32(0.5), np.float32(1))


def levels(bits: int) -> np.float32:
    return np.float32(2**bits - 1)


def hurtful_tokens(rows: int, inner: int) -> np.ndarray:
    """Normal tokens; of more than ten some are zero, constant, one-sided, tiny, ties, outliers."""
    x = np.random.default_rng(inner + rows).standard_normal((rows, inner), np.float32)
    if rows > 10:
        x[0], x[1], x[2], x[3], x[4] = 0, 1.5, -3, x[3] + 9, 1e-12 * x[4]
        x[5, inner // 2], x[6, -1], x[7] = 300, -3e4, np.round(2 * x[7]) / 2
    return x


def weight_of(case: Case, layout: str = "rows", *, integers: bool = False) -> Weight:
    """Random codes, a column of zeros and one at each end; a product of integers if asked."""
    rng, half = np.random.default_rng(case.columns), 2 ** (case.weight_bits - 1)
    codes = rng.integers(-half, half, (case.inner, case.columns), np.int8)
    codes[:, 0], codes[:, 1], codes[:, 2] = 0, -half, half - 1
    scale, zero_point = rng.uniform(0.1, 1, case.columns), rng.uniform(-half, half, case.columns)
    bias = rng.standard_normal(case.columns)
    if integers:
        scale, zero_point, bias = 1 + 0 * scale, np.round(zero_point), np.round(9 * bias)
    sums = codes.sum(0, dtype=np.int64)
    statistics = [np.float32(each) for each in (scale, zero_point, sums, bias)]
    return Weight(lay_out(codes, case.weight_bits, layout), *statistics)


def integer_tokens(case: Case) -> QuantizedTokens:
    """Tokens that stand for integers, one of them for the largest."""
    rng, half = np.random.default_rng(case.rows), 2 ** (case.act_bits - 1)
    codes = rng.integers(-half, half, (case.rows, case.inner), np.int8)
    codes[-1] = -half
    zero_point = np.float32(rng.integers(-half, half, (case.rows, 1)))
    sums = codes.sum(1, keepdims=True, dtype=np.int64)
    return QuantizedTokens(codes, np.ones_like(zero_point), zero_point, np.float32(sums))


def real_tokens(case: Case) -> tuple[np.ndarray, QuantizedTokens]:
    """Floats, and what the definition makes of them."""
    x = hurtful_tokens(case.rows, case.inner)
    tokens = quantize_tokens(x, *CLIPS, levels(case.act_bits))
    return x, QuantizedTokens(*(np.asarray(each) for each in tokens))


def dequantized(weight: Weight) -> np.ndarray:
    """What a weight in layout `rows` stands for, float64."""
    codes = np.asarray(weight.codes.astype(np.int8), np.float64)
    return (codes - np.float64(weight.zero_point)) * np.float64(weight.scale)


def on_paper(tokens: QuantizedTokens, weight: Weight) -> np.ndarray:
    """The product of what both stand for, float64, in which all integers here are exact."""
    x = np.float64(tokens.scale) * (np.float64(tokens.codes) - np.float64(tokens.zero_point))
    return x @ dequantized(weight) + np.float64(weight.bias)


def roundings_of(tokens: QuantizedTokens, weight: Weight) -> np.ndarray:
    """The product of the codes, its three corrections and the bias without their signs.

    They cancel: of a token with an outlier all other codes are alike, and what is left of sums of
    thousands is one product.
    """
    a, w = abs(np.float64(tokens.zero_point)), abs(np.float64(weight.zero_point))
    codes = np.float64(tokens.codes) @ np.asarray(weight.codes.astype(np.int8), np.float64)
    terms = abs(codes) + a * abs(weight.code_sum) + abs(tokens.row_sum) * w
    terms = terms + tokens.codes.shape[1] * a * w
    return np.float64(tokens.scale) * weight.scale * terms + abs(weight.bias)


def assert_close(found: np.ndarray, expected: np.ndarray, size: np.ndarray) -> None:
    """Within ROUNDINGS of a size."""
    off = (abs(np.float64(found) - expected) / size).max(1)
    assert off.max() <= ROUNDINGS, f"token {off.argmax()} is off by {off.max():.1e}"
