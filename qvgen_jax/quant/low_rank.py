"""The low-rank branch: its start, its refactoring when the rank halves, and its end.

And the adapter that is merged into the weight instead (EfficientDM, arXiv 2310.03270).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.reference import at_least_float32

# Up to this smaller side the full SVD is cheap; above, the randomized one.
_DENSE_SVD_SIDE = 512
_OVERSAMPLE = 32
_POWER_STEPS = 4
# QVGen calls a singular value small when it is this many times below the first.
_SMALL_RATIO = 14.0


def _pad(array: jax.Array, rank: int, axis: int) -> jax.Array:
    missing = rank - array.shape[axis]
    widths = [(0, max(missing, 0)) if i == axis else (0, 0) for i in range(2)]
    return jnp.pad(jax.lax.slice_in_dim(array, 0, min(rank, array.shape[axis]), axis=axis), widths)


def _split(u: jax.Array, s: jax.Array, vt: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """`U sqrt(S) [out, rank]` and `sqrt(S) V^T [rank, in]`."""
    root = jnp.sqrt(s)
    return _pad(u * root, rank, 1), _pad(root[:, None] * vt, rank, 0)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """In whole float32: what a GPU and a TPU multiply by default is no basis for an SVD."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def dense_svd(matrix: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """L `[out, rank]` and R `[rank, in]` from the full SVD of `[out, in]`: the best there is."""
    return _split(*jnp.linalg.svd(matrix, full_matrices=False), rank)


def randomized_svd(matrix: jax.Array, rank: int, seed: int = 0) -> tuple[jax.Array, jax.Array]:
    """L and R from the SVD within a random subspace (Halko et al. 2011), never the full one.

    Power iterations matter: the error of a quantized weight has a nearly flat spectrum.
    """
    width = min(rank + _OVERSAMPLE, *matrix.shape)
    probe = jax.random.normal(jax.random.key(seed), (matrix.shape[1], width), matrix.dtype)
    basis = jnp.linalg.qr(_product(matrix, probe))[0]
    for _ in range(_POWER_STEPS):
        other = jnp.linalg.qr(_product(matrix.T, basis))[0]
        basis = jnp.linalg.qr(_product(matrix, other))[0]
    u, s, vt = jnp.linalg.svd(_product(basis.T, matrix), full_matrices=False)
    return _split(_product(basis, u), s, vt, rank)


def initial_branch(
    kernel: jax.Array, dequantized: jax.Array, rank: int
) -> tuple[jax.Array, jax.Array]:
    """The branch that makes up for most of the quantization error at step 0.

    Args:
        kernel: `[in, out]`.
        dequantized: `[in, out]`, what the quantized kernel stands for.
        rank: of the branch; columns beyond min(in, out) are zero.

    Returns:
        L `[out, rank]`, R `[rank, in]`, float32 or a kernel's float64, with
        `kernel - dequantized ~ (L @ R)^T`, columns sorted by singular value, which both sides share
        as square roots.
    """
    error = (at_least_float32(kernel) - at_least_float32(dequantized)).T
    small = min(error.shape) <= max(_DENSE_SVD_SIDE, rank)
    return dense_svd(error, rank) if small else randomized_svd(error, rank)


def initial_adapter(key: jax.Array, kernel: jax.Array, rank: int) -> tuple[jax.Array, jax.Array]:
    """An adapter that changes nothing yet, as LoRA's: L is zero, R uniform in +-1 / sqrt(in).

    EfficientDM's `loraB` and `loraA` (ThisisBillhe/EfficientDM, quant_scripts/quant_layer.py).

    Args:
        key: of this layer.
        kernel: `[..., in, out]`.
        rank: of the adapter.

    Returns:
        L float32 `[..., out, rank]`, R float32 `[..., rank, in]`.
    """
    *stack, width, out = kernel.shape
    bound = width**-0.5
    right = jax.random.uniform(key, (*stack, rank, width), jnp.float32, -bound, bound)
    return jnp.zeros((*stack, out, rank), jnp.float32), right


def merge_adapter(kernel: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`kernel + (L @ R)^T`: `[..., in, out]`, in the kernel's dtype.

    In whole float32: what training and an export compute differs by rounding at most, which moves
    the code of a weight only where it lies between two.
    """
    return kernel + jnp.swapaxes(_product(left, right), -1, -2).astype(kernel.dtype)


@jax.jit
def _merged(kernel: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """`merge_adapter`; of a stack layer by layer, so that one product exists at a time."""
    sides = kernel, left, right
    if kernel.ndim == 2:
        return merge_adapter(*sides)
    return jax.lax.map(lambda layer: merge_adapter(*layer), sides)


def merge_adapters(tree: Any) -> Any:
    """Params whose every kernel has its adapter in it, without any L and R.

    The kernels that come in stay, beside the new ones.
    """

    def on_branch(node: dict) -> dict:
        return {**node, "kernel": _merged(node["kernel"], node["L"], node["R"])}

    return drop_branch(_rebuild(tree, on_branch))


def _triangles(left: jax.Array, right: jax.Array):
    """Orthonormal bases of L's and R^T's columns, and the SVD of what is between them."""
    left_basis, left_triangle = jnp.linalg.qr(left)
    right_basis, right_triangle = jnp.linalg.qr(right.T)
    middle = _product(left_triangle, right_triangle.T)
    u, s, vt = jnp.linalg.svd(middle, full_matrices=False)
    return _product(left_basis, u), s, _product(vt, right_basis.T)


def refactor(
    left: jax.Array, right: jax.Array, rank: jax.Array | int
) -> tuple[jax.Array, jax.Array]:
    """The SVD form of the branch's first `rank` components, in arrays of the same shapes.

    Equal to the SVD of the product `[out, in]`, at the cost of one of `[r, r]`.

    Args:
        left: `[out, r]`.
        right: `[r, in]`.
        rank: how many leading components live on; may be traced.

    Returns:
        L and R: columns sorted by singular value, split by its square root; the others zero.
    """
    alive = jnp.arange(left.shape[1]) < rank
    left, right = jnp.where(alive, left, 0), jnp.where(alive[:, None], right, 0)
    new_left, new_right = _split(*_triangles(left, right), left.shape[1])
    return jnp.where(alive, new_left, 0), jnp.where(alive[:, None], new_right, 0)


def singular_values(left: jax.Array, right: jax.Array, gate: jax.Array) -> jax.Array:
    """Of the branch as it stands, `(L * gate) @ R`, the largest first.

    Args:
        left, right: `[out, r]`, `[r, in]`, or `[layers, ...]` of both.
        gate: `[r]`.

    Returns:
        `[min(out, r, in)]`, or `[layers, ...]`.
    """

    def one(pair: tuple) -> jax.Array:
        return _triangles(pair[0] * gate, pair[1])[1]

    # Layer by layer, not by vmap: see `on_every_branch`.
    return one((left, right)) if left.ndim == 2 else jax.lax.map(one, (left, right))


def reverse(left: jax.Array, right: jax.Array, rank: jax.Array | int) -> tuple:
    """The first `rank` components in the opposite order, so that the others leave first."""
    place = jnp.arange(left.shape[1])
    place = jnp.where(place < rank, rank - 1 - place, place)
    return left[:, place], right[place]


def change_of_basis(
    left: jax.Array, right: jax.Array, new_left: jax.Array, new_right: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What a refactoring does to the gradients of L and R.

    The product stays: `new_left = left @ A`, `new_right = A^-1 @ right`. So the gradient of L is
    multiplied by `A^-T` from the right, and that of R by `A^T` from the left.

    Args:
        left, right: `[out, r]`, `[r, in]`, before.
        new_left, new_right: after; of lower rank where components died.

    Returns:
        `A^-T` and `A^T`, both `[r, r]`; zero where either side's components are.
    """
    for_left = (new_right @ jnp.linalg.pinv(right)).T
    for_right = (jnp.linalg.pinv(left) @ new_left).T
    return for_left, for_right


def _is_branch(node: Any) -> bool:
    return isinstance(node, dict) and "L" in node and "R" in node


def _rebuild(tree: Any, on_branch: Callable[[dict], dict]) -> Any:
    """A copy of nested dicts, lists and (named) tuples, every dict with a branch mapped."""
    if isinstance(tree, dict):
        node = {key: _rebuild(value, on_branch) for key, value in tree.items()}
        return on_branch(node) if _is_branch(node) else node
    if isinstance(tree, tuple | list):
        children = [_rebuild(child, on_branch) for child in tree]
        return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
    return tree


def on_every_branch(tree: Any, change: Callable) -> Any:
    """`tree` with `(L, R)` of every branch replaced by `change(L, R)`, stacked ones layer by layer.

    Not by `jax.vmap`: XLA's CPU spreads batched LAPACK calls over its pool and waits inside it, and
    several of them at once come to a standstill on two cores (seen with jax 0.10.2).
    """

    def on_branch(node: dict) -> dict:
        pair = node["L"], node["R"]
        if node["L"].ndim == 2:
            left, right = change(*pair)
        else:
            left, right = jax.lax.map(lambda layer: change(*layer), pair)
        return {**node, "L": left, "R": right}

    return _rebuild(tree, on_branch)


def replace_branches(tree: Any, change: Callable[[dict], dict]) -> Any:
    """`tree` with `{"L", "R"}` of every branch replaced by `change` of it, nothing else copied."""
    return _rebuild(tree, lambda node: {**node, **change({name: node[name] for name in "LR"})})


def refactor_tree(params: dict, rank: jax.Array | int, order: str = "smallest") -> dict:
    """`params` with every branch refactored to `rank`; what leaves first comes last."""

    def change(left: jax.Array, right: jax.Array) -> tuple:
        left, right = refactor(left, right, rank)
        return reverse(left, right, rank) if order == "largest" else (left, right)

    return on_every_branch(params, change)


def cut_tree(params: dict, rank: jax.Array | int) -> dict:
    """`params` with the components of every branch beyond `rank` zero, the others as they are.

    Or an optax state with their moments zero.
    """

    def change(left: jax.Array, right: jax.Array) -> tuple:
        alive = jnp.arange(left.shape[1]) < rank
        return jnp.where(alive, left, 0), jnp.where(alive[:, None], right, 0)

    return on_every_branch(params, change)


def zero_branch(tree: Any) -> Any:
    """The tree with every L and R zero: resets the optimizer's moments after a refactoring.

    Goes through dicts, lists, tuples and named tuples, so params and optax states alike.
    """
    return _rebuild(
        tree,
        lambda node: {**node, **jax.tree.map(jnp.zeros_like, {"L": node["L"], "R": node["R"]})},
    )


def drop_branch(tree: Any) -> Any:
    """The tree without any L and R, for params and optax states alike."""
    return _rebuild(tree, lambda node: {k: v for k, v in node.items() if k not in ("L", "R")})


def small_singular_share(params: dict) -> jax.Array:
    """The share of the branches' singular values more than 14 times below their layer's first.

    Returns:
        float32 `[]` over all branches (the paper's figure 3), NaN where there is none.
    """
    small, total = jnp.zeros((), jnp.float32), 0

    def on_branch(node: dict) -> dict:
        nonlocal small, total
        pairs = (
            node["L"].reshape(-1, *node["L"].shape[-2:]),
            node["R"].reshape(-1, *node["R"].shape[-2:]),
        )
        values = jax.lax.map(lambda pair: _triangles(*pair)[1], pairs)
        small += jnp.sum(values * _SMALL_RATIO < values[:, :1])
        total += values.size
        return node

    _rebuild(params, on_branch)
    return small / total if total else jnp.asarray(math.nan, jnp.float32)
