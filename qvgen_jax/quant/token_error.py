"""What a quantized linear says of some tokens, and how far that is from what it should say."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.quantize_tokens import dequantize_tokens, quantize_tokens
from qvgen_jax.quant.rotation import rotate

_HIGHEST = jax.lax.Precision.HIGHEST


class Branch(NamedTuple):
    """`L [out, rank]` and `R [rank, in]` beside a kernel: `kernel + (L @ R)^T`."""

    left: jax.Array
    right: jax.Array


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In whole float32: errors of quantization are what is compared."""
    return jnp.matmul(a, b, precision=_HIGHEST)


def branch_weight(branch: Branch) -> jax.Array:
    """`[in, out]` that a branch stands for."""
    return product(branch.left, branch.right).T


def prepared(rows: jax.Array, factors: jax.Array | None, block: int) -> jax.Array:
    """`rows [rows, in]` smoothed and rotated, as their kernel wants them."""
    return rotate(rows if factors is None else rows / factors, block)


def outputs(
    rows: jax.Array, kernel: jax.Array, act_levels: jax.Array, branch: Branch | None
) -> jax.Array:
    """What a linear says at inference, `[rows, out]`, without its bias.

    Args:
        rows: `[rows, in]`, prepared; quantized here, each over its whole range.
        kernel: `[in, out]`, what its codes stand for.
        act_levels: `[]`, 2^bits - 1 of the tokens.
        branch: of tokens that are not quantized; or None.
    """
    whole = jnp.ones((), jnp.float32)
    y = product(dequantize_tokens(quantize_tokens(rows, whole, whole, act_levels)), kernel)
    if branch is not None:
        y = y + product(product(rows, branch.right.T), branch.left.T)
    return y


def relative(found: jax.Array, expected: jax.Array) -> jax.Array:
    """`|found - expected| / |expected|`, float32 `[]`; 0 where nothing was expected nor found."""
    size = jnp.linalg.norm(expected)
    return jnp.linalg.norm(found - expected) / jnp.where(size > 0, size, 1.0)
