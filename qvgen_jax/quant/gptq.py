"""GPTQ: a kernel rounded row by row, each row's error made up for by the rows that follow.

Source: arXiv 2210.17323, algorithm 1, and IST-DASLab/gptq, `gptq.py`. Theirs is `[out, in]`; in our
kernels `[in, out]` one input channel is a row, and all output channels go on side by side.
"""

from functools import partial

import jax
import jax.numpy as jnp

from qvgen_jax.quant.weights import dequantize_weight, quantize_weight

BLOCK = 128
"""Rows whose errors are gathered before the rest of the kernel hears of them."""

_HIGHEST = jax.lax.Precision.HIGHEST


def compensation(gram: jax.Array, damping: float) -> jax.Array:
    """The upper triangular U with `U^T U = inverse(gram + damping * mean(diagonal) * I)`.

    By one Cholesky factorization and one triangular inverse: with the channels in reverse order
    `gram = M M^T` has an upper triangular M, and `U = inverse(M)`. The release factorizes,
    inverts and factorizes again, which in float32 loses more.

    Args:
        gram: `[in, in]`, the sum of `x x^T` over the tokens. A channel that is always 0 gets a 1 on
            the diagonal, as in the release.
        damping: as a share of the mean of the diagonal.
    """
    diagonal = jnp.diagonal(gram)
    diagonal = jnp.where(diagonal > 0, diagonal, 1.0)
    gram = gram + jnp.diag(diagonal + damping * diagonal.mean() - jnp.diagonal(gram))
    reverse = jnp.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1]
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    return jax.scipy.linalg.solve_triangular(reverse, identity, lower=False)


@partial(jax.jit, static_argnames=("block", "by_activity"))
def gptq_codes(
    kernel: jax.Array,
    gram: jax.Array,
    scale: jax.Array,
    zero_point: jax.Array | None,
    levels: jax.Array,
    *,
    damping: float = 0.01,
    block: int = BLOCK,
    by_activity: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Signed int8 codes `[in, out]` that keep the tokens' products, rather than the weights.

    Args:
        kernel: float32 `[in, out]`.
        gram: float32 `[in, in]`, the sum of `x x^T` over the tokens as the kernel reads them.
        scale, zero_point: `[out]`, fixed beforehand; None for symmetric weights.
        levels: `[]`, 2^bits - 1.
        damping: see `compensation`.
        block: rows that go together; any number gives the same to rounding.
        by_activity: the loudest channels first, while most rows are left to make up for them
            (`actorder` in the release).

    Returns:
        Codes, and whether they are any: bool `[]`, false where `gram` with its damping has no
        Cholesky factor. Codes are whole numbers, in which that does not show.
    """
    order = jnp.arange(len(kernel))
    if by_activity:
        order = jnp.argsort(-jnp.diagonal(gram))
    silent = (jnp.diagonal(gram) <= 0)[order]
    upper = compensation(gram[order][:, order], damping)
    rows = jnp.where(silent[:, None], 0.0, kernel[order])
    rounding = (scale, zero_point, levels)
    codes = _in_blocks(rows, upper, rounding, min(block, len(kernel)))
    return jnp.zeros_like(codes).at[order].set(codes), jnp.isfinite(upper).all()


def _in_blocks(rows: jax.Array, upper: jax.Array, rounding: tuple, block: int) -> jax.Array:
    """Codes of `rows [in, out]`, in their order."""
    length, missing = len(rows), -len(rows) % block
    rows = jnp.pad(rows, ((0, missing), (0, 0)))
    # What is padded stands alone: a 1 on the diagonal, nothing beside it.
    upper = jnp.pad(upper, ((0, missing), (0, missing)))
    upper = upper + jnp.diag((jnp.arange(length + missing) >= length).astype(upper.dtype))

    def step(index: jax.Array, carry: tuple) -> tuple:
        rows, codes = carry
        start = index * block
        own = jax.lax.dynamic_slice_in_dim(rows, start, block)
        factors = jax.lax.dynamic_slice_in_dim(upper, start, block)
        inner = jax.lax.dynamic_slice_in_dim(factors, start, block, axis=1)
        found, errors = _one_block(own, inner, rounding)
        # Rows that are done hear of it too, to no effect: left of the diagonal there are zeros.
        rows = rows - jnp.matmul(factors.T, errors, precision=_HIGHEST)
        return rows, jax.lax.dynamic_update_slice_in_dim(codes, found, start, axis=0)

    start = rows, jnp.zeros(rows.shape, jnp.int8)
    return jax.lax.fori_loop(0, len(rows) // block, step, start)[1][:length]


def _one_block(rows: jax.Array, upper: jax.Array, rounding: tuple) -> tuple[jax.Array, jax.Array]:
    """Codes int8 `[block, out]` and each row's error over its diagonal, `[block, out]`."""

    def step(index: jax.Array, carry: tuple) -> tuple:
        rows, codes, errors = carry
        row = jax.lax.dynamic_index_in_dim(rows, index)
        code = quantize_weight(row, *rounding)
        factors = jax.lax.dynamic_index_in_dim(upper, index, keepdims=False)
        error = (row - dequantize_weight(code, *rounding)) / factors[index]
        rows = rows - factors[:, None] * error
        codes = jax.lax.dynamic_update_slice_in_dim(codes, code, index, axis=0)
        return rows, codes, jax.lax.dynamic_update_slice_in_dim(errors, error, index, axis=0)

    start = rows, jnp.zeros(rows.shape, jnp.int8), jnp.zeros_like(rows)
    return jax.lax.fori_loop(0, len(rows), step, start)[1:]
