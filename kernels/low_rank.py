"""The gated low-rank branch of a linear, in token space (QVGen, arXiv 2505.11497, section 3)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.reference import wide_type
from kernels.target import target


class LowRank(NamedTuple):
    """`(left * gate) @ right` beside a kernel.

    Attributes:
        left: float32 `[out, rank]`.
        right: float32 `[rank, in]`.
        gate: float32 `[rank]`.
    """

    left: jax.Array
    right: jax.Array
    gate: jax.Array


def rows_matmul(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x [..., in] @ kernel [in, out]`, accumulated in float32 at least.

    On a CPU the leading axes are one axis inside: XLA contracts two axes at once there, as the
    gradient of the kernel would, 2.4 times slower. Elsewhere they stay apart, as samples and tokens
    do over a mesh: no compiler cuts what both became one of without gathering it first.
    """
    rows = x.reshape(-1, x.shape[-1]) if target().platform == "cpu" else x
    y = jnp.matmul(rows, kernel, preferred_element_type=wide_type(x.dtype))
    return y.reshape(*x.shape[:-1], kernel.shape[-1])


def kernel_gradient(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Of the kernel in `rows_matmul(x, kernel)`: `[in, out]`, the sum over all leading axes."""
    if target().platform == "cpu":
        x, cotangent = (each.reshape(-1, each.shape[-1]) for each in (x, cotangent))
    leading = tuple(range(x.ndim - 1))
    return jax.lax.dot_general(
        x,
        cotangent,
        ((leading, leading), ((), ())),
        preferred_element_type=wide_type(x.dtype),
    )


def low_rank_matmul(values: jax.Array, branch: LowRank) -> jax.Array:
    """`((values @ right^T) * gate) @ left^T`: `[..., in]` to `[..., out]`, in the values' dtype.

    A closed gate costs a product but changes nothing, so that one compilation serves all phases.
    The gate is a schedule, not a parameter: it carries no gradient.
    """
    return rows_matmul(low_rank_hidden(values, branch), branch.left.T.astype(values.dtype))


def low_rank_hidden(values: jax.Array, branch: LowRank) -> jax.Array:
    """The first half, `(values @ right^T) * gate`: `[..., in]` to `[..., rank]`."""
    hidden = rows_matmul(values, branch.right.T.astype(values.dtype))
    return (hidden * jax.lax.stop_gradient(branch.gate)).astype(values.dtype)


def branch_in_weights(values: jax.Array, branch: LowRank) -> jax.Array:
    """`values @ ((L * gate) @ R)^T`, as the release computes it: a product of full size.

    `low_rank_matmul` to rounding, in its shapes and dtypes.
    """
    gated = branch.left * jax.lax.stop_gradient(branch.gate)
    return rows_matmul(values, jnp.matmul(gated, branch.right).T.astype(values.dtype))
