"""The exponents of smoothing, layer by layer, that leave the least error on some tokens.

Source: mit-han-lab/deepcompressor, `calib/smooth.py` and `calib/config/smooth.py`, with what
SVDQuant sets there: `max|x|^a / max|w|^b` for b = 0 and b = 1 - a over a grid of a, and none at
all; tokens and kernel quantized, and the branch there while they are compared. There, q, k and v
share their factors, which the norm before them takes; here every linear has its own.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.quant.rotation import rotate_kernel
from qvgen_jax.quant.smoothing import smooth_factors
from qvgen_jax.quant.svd_branch import svd_branch
from qvgen_jax.quant.token_error import outputs, prepared, product, relative
from qvgen_jax.quant.weights import dequantize_weight, min_max_range, quantize_weight


def exponents(points: int) -> np.ndarray:
    """The pairs (a, b) to try, float32 `[2 * points - 1, 2]`: none, (a, 0) and (a, 1 - a)."""
    steps = np.arange(1, points, dtype=np.float32) / points
    alone, balanced = np.stack([steps, 0 * steps], 1), np.stack([steps, 1 - steps], 1)
    return np.concatenate([np.zeros((1, 2), np.float32), alone, balanced])


@partial(jax.jit, static_argnames=("points", "block", "rank", "symmetric"))
def search_factors(
    maxima: jax.Array,
    kernel: jax.Array,
    rows: jax.Array,
    levels: tuple[jax.Array, jax.Array],
    *,
    points: int,
    block: int = 1,
    rank: int = 0,
    symmetric: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The factors with the least error of the outputs, and the error of every candidate.

    Args:
        maxima: `[in]`, each channel's largest magnitude.
        kernel: float32 `[in, out]`.
        rows: float32 `[rows, in]`, tokens as they come.
        levels: of weights and of tokens, `[]` each.
        points: of the grid.
        block: of the rotation between smoothing and codes; 1 for none.
        rank: of the branch; 0 for none.
        symmetric: of the weights.

    Returns:
        Factors float32 `[in]`; relative errors `[candidates]` in the order of `exponents`.
    """
    expected, (weight_levels, act_levels) = product(rows, kernel), levels

    def factors_at(pair: jax.Array) -> jax.Array:
        return smooth_factors(maxima, kernel, pair[0], pair[1])

    def error(pair: jax.Array) -> jax.Array:
        factors = factors_at(pair)
        rest, branch = rotate_kernel(kernel * factors[:, None], block), None
        if rank:
            branch, rest = svd_branch(rest, rank)
        # The whole range: a search of ranges for every candidate would cost eighty times as much.
        weight = (*min_max_range(rest, weight_levels, symmetric), weight_levels)
        rest = dequantize_weight(quantize_weight(rest, *weight), *weight)
        y = outputs(prepared(rows, factors, block), rest, act_levels, branch)
        return relative(y, expected)

    pairs = jnp.asarray(exponents(points))
    errors = jax.lax.map(error, pairs)
    return factors_at(pairs[jnp.argmin(errors)]), errors
