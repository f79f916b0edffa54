"""`jax.lax.scan` over stacked layers, without the copies that XLA's CPU backend makes of bfloat16.

That backend slices bfloat16 by way of float32, and hoists the conversion out of the loop, since
nothing in it changes: the weights of all layers then lie in float32 beside themselves, three times
the memory, and every layer's are narrowed again. What an optimization barrier gives together with
the index does change, so that conversion and slice stay one loop over one layer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from kernels.target import target


def layer_scan(body: Callable, init: Any, layers: Any) -> tuple[Any, Any]:
    """`jax.lax.scan(body, init, layers)`, the same values and gradients.

    Args:
        body: `(carry, layer) -> (carry, output)`.
        layers: pytree of arrays `[length, ...]`.
    """
    leaves, tree = jax.tree.flatten(layers)
    narrow = [target().platform == "cpu" and x.dtype == jnp.bfloat16 for x in leaves]

    def step(carry: Any, row: tuple[jax.Array, list[jax.Array]]) -> tuple[Any, Any]:
        index, others = row[0], iter(row[1])
        cut = [
            _cut(x, index) if apart else next(others)
            for x, apart in zip(leaves, narrow, strict=True)
        ]
        return body(carry, jax.tree.unflatten(tree, cut))

    others = [x for x, apart in zip(leaves, narrow, strict=True) if not apart]
    return jax.lax.scan(step, init, (jnp.arange(len(leaves[0])), others))


def _cut(stack: jax.Array, index: jax.Array) -> jax.Array:
    stack, index = jax.lax.optimization_barrier((stack, index))
    return jax.lax.dynamic_index_in_dim(stack, index, keepdims=False)
