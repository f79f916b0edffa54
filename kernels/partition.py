"""Kernels over the devices of a mesh: XLA cannot partition one, so each device calls its own."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

_WHOLE_ROWS = 8


def automatic_axes() -> dict[str, int]:
    """The context's mesh axes over which XLA would have to partition a kernel.

    Raises:
        NotImplementedError: no mesh says which of several devices the program runs on.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty and jax.device_count() > 1:
        raise NotImplementedError(
            f"there are {jax.device_count()} devices and no mesh; call it under "
            "jax.set_mesh(mesh), of one device if one runs it"
        )
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return {name: mesh.shape[name] for name in types if types[name] == AxisType.Auto}


def over_rows(run: Callable[[Any, Any], jax.Array], by_row: Any, whole: Any) -> jax.Array:
    """`run(by_row, whole)`, with the rows spread over all devices of the mesh in the context.

    Args:
        run: a kernel's call on one device; row i of its result depends on row i of `by_row` alone.
        by_row: pytree of arrays `[rows, ...]`. Rows are added so that every device has as many.
        whole: pytree of what every device needs whole, such as a weight.

    Returns:
        `[rows, ...]`.

    Raises:
        NotImplementedError: see `automatic_axes`.
    """
    axes = automatic_axes()
    if not axes:
        return run(by_row, whole)
    devices = math.prod(axes.values())
    rows = len(jax.tree.leaves(by_row)[0])
    extra = -rows % (devices * _WHOLE_ROWS) if devices > 1 else 0

    def longer(x: jax.Array) -> jax.Array:
        # The last row again: a scale of zero would divide.
        return jnp.pad(x, ((0, extra), *[(0, 0)] * (x.ndim - 1)), mode="edge") if extra else x

    spread = PartitionSpec(tuple(axes))
    run = jax.shard_map(
        run,
        in_specs=(spread, PartitionSpec()),
        out_specs=spread,
        axis_names=set(axes),
        check_vma=False,
    )
    return run(jax.tree.map(longer, by_row), whole)[:rows]
