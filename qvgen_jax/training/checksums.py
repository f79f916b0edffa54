"""A number for every array of a state, from its bits: what was saved is what comes back.

Computed where the slices lie, once when a checkpoint is begun and once when it is restored, so
that nothing between them, a disk, a network or a file format, changes a bit unseen.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORDS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def checksums(state: Any) -> jax.Array:
    """uint32 `[leaves]`, in the order of `jax.tree.leaves`.

    Each is the sum of the array's words, every word times an odd number that depends on its place,
    modulo 2^32: a word that changes alone always changes it, whatever the slices.
    """
    # A program per shape: one of all arrays takes as long to compile as half a training step.
    return _stack([_checksum(leaf) for leaf in jax.tree.leaves(state)])


_stack = jax.jit(jnp.stack)


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    word = _WORDS.get(array.dtype.itemsize, jnp.uint32)  # Of 8 bytes: two.
    words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
    factor = jnp.zeros(words.shape, jnp.uint32)
    for axis in range(words.ndim):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        factor = factor * jnp.uint32(0x9E3779B1) + place
    return jnp.sum(words * (2 * factor + 1), dtype=jnp.uint32)


def changed(state: Any, expected: np.ndarray) -> list[str]:
    """Names of the arrays whose checksum is another one than expected; all of them if of others."""
    found = np.asarray(checksums(state))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    if found.shape != np.shape(expected):
        return paths
    return [path for path, same in zip(paths, found == expected, strict=True) if not same]
