"""One linear quantized without training: a row of choices that do not depend on each other.

Smoothing, rotation, a low-rank branch, the range of the codes and how weights become codes; each
published method is such a row (`qvgen_jax.ptq.methods`).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from qvgen_jax.quant.gptq import gptq_codes
from qvgen_jax.quant.rotation import rotate, rotate_kernel
from qvgen_jax.quant.smoothing import smooth_factors
from qvgen_jax.quant.smoothing_search import search_factors
from qvgen_jax.quant.svd_branch import refined_branch
from qvgen_jax.quant.token_error import Branch, branch_weight, outputs, prepared, product, relative
from qvgen_jax.quant.weights import (
    dequantize_weight,
    min_max_range,
    quantize_weight,
    search_range,
)


class Choices(NamedTuple):
    """How a linear is quantized.

    Attributes:
        smoothing: `none`, `fixed` (SmoothQuant's formula at `exponent`), or `searched`.
        exponent: of `fixed` smoothing.
        points: of the grid that `searched` smoothing goes through.
        rotation: `none` or `hadamard`.
        rank: of a branch in 16 bits; 0 for none.
        iterations: of the branch, see `refined_branch`.
        range: `minmax` or `search`.
        rounding: `nearest` or `gptq`.
        damping, by_activity: of GPTQ.
        symmetric: zero is the middle of the codes.
    """

    smoothing: str = "none"
    exponent: float = 0.5
    points: int = 10
    rotation: str = "none"
    rank: int = 0
    iterations: int = 1
    range: str = "minmax"
    rounding: str = "nearest"
    damping: float = 0.01
    by_activity: bool = False
    symmetric: bool = False


class Seen(NamedTuple):
    """What is known of a linear's tokens, as they come.

    Attributes:
        maxima: float32 `[in]`, each channel's largest magnitude.
        rows: float32 `[rows, in]`, some of them.
        gram: float32 `[in, in]`, the sum of `x x^T` over all; None where nothing asks for it.
    """

    maxima: jax.Array
    rows: jax.Array
    gram: jax.Array | None = None


class Untrained(NamedTuple):
    """A quantized linear and what it loses.

    Attributes:
        codes: signed int8 `[in, out]`.
        scale: float32 `[out]`.
        zero_point: float32 `[out]`, unsigned convention; None if symmetric.
        factors: float32 `[in]` of smoothing, or None.
        branch: of the prepared tokens, or None.
        weight_error: `|what codes and branch stand for - kernel| / |kernel|`, of the kernel as its
            tokens are prepared.
        output_error: the same of what it says of `Seen.rows`, tokens quantized; NaN where GPTQ
            found no factor.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    factors: jax.Array | None
    branch: Branch | None
    weight_error: jax.Array
    output_error: jax.Array


@partial(jax.jit, static_argnames=("choices", "block"))
def quantize_linear(
    kernel: jax.Array,
    seen: Seen,
    levels: tuple[jax.Array, jax.Array],
    choices: Choices,
    block: int = 1,
) -> Untrained:
    """Codes, ranges, factors and branch of one kernel.

    Args:
        kernel: `[in, out]`.
        seen: its tokens; `gram` is needed for `gptq`.
        levels: 2^bits - 1 of weights and of tokens, float32 `[]`.
        choices: how.
        block: of the rotation, which `choices` asks for; 1 for none.
    """
    kernel = kernel.astype(jnp.float32)
    factors = _factors(kernel, seen, levels, choices, block)
    ready = kernel if factors is None else kernel * factors[:, None]
    ready = rotate_kernel(ready, block)
    rows = prepared(seen.rows, factors, block)
    branch, rest = _branch(ready, rows, levels, choices)
    scale, zero_point = _range(rest, levels[0], choices)
    weight = (scale, zero_point, levels[0])
    if choices.rounding == "gptq":
        gram = prepared_gram(seen.gram, factors, block)
        how = {"damping": choices.damping, "by_activity": choices.by_activity}
        codes, sound = gptq_codes(rest, gram, *weight, **how)
    else:
        codes, sound = quantize_weight(rest, *weight), True
    stands_for = dequantize_weight(codes, *weight)
    y = outputs(rows, stands_for, levels[1], branch)
    whole = stands_for if branch is None else stands_for + branch_weight(branch)
    output_error = jnp.where(sound, relative(y, product(seen.rows, kernel)), jnp.nan)
    errors = relative(whole, ready), output_error
    return Untrained(codes, scale, zero_point, factors, branch, *errors)


def prepared_gram(gram: jax.Array, factors: jax.Array | None, block: int) -> jax.Array:
    """`[in, in]`, the sum of `x x^T` over tokens that are smoothed and rotated."""
    if factors is not None:
        gram = gram / factors[:, None] / factors
    return rotate(rotate(gram, block).T, block)


def _factors(
    kernel: jax.Array, seen: Seen, levels: tuple, choices: Choices, block: int
) -> jax.Array | None:
    if choices.smoothing == "none":
        return None
    if choices.smoothing == "fixed":
        return smooth_factors(seen.maxima, kernel, choices.exponent)
    how = {"points": choices.points, "block": block, "symmetric": choices.symmetric}
    return search_factors(seen.maxima, kernel, seen.rows, levels, rank=choices.rank, **how)[0]


def _branch(
    kernel: jax.Array, rows: jax.Array, levels: tuple, choices: Choices
) -> tuple[Branch | None, jax.Array]:
    """The branch, and what is left of the kernel for the codes."""
    if not choices.rank:
        return None, kernel

    def quantized(rest: jax.Array) -> jax.Array:
        weight = (*_range(rest, levels[0], choices), levels[0])
        return dequantize_weight(quantize_weight(rest, *weight), *weight)

    return refined_branch(kernel, choices.rank, quantized, rows, levels[1], choices.iterations)


def _range(
    kernel: jax.Array, levels: jax.Array, choices: Choices
) -> tuple[jax.Array, jax.Array | None]:
    find = {"minmax": min_max_range, "search": search_range}[choices.range]
    return find(kernel, levels, choices.symmetric)
