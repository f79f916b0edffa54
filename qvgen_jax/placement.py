"""Where a pipeline's arrays live: whole on every device of a mesh, or in the caller's shardings."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, Sharding

from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES
from qvgen_jax.sharding import layout, shard

Shardings = Sharding | Mapping[str, Any] | Callable[[dict], Any] | None
"""One sharding for all parameters; or a nested dict like theirs, where one sharding may stand for a
whole subtree; or a function of the nested dict of `jax.ShapeDtypeStruct` that gives either."""

_SHOWN = 4  # Of the leaves that an error is about; the others are counted.


def automatic(mesh: Mesh) -> Mesh:
    """The mesh as the models want it: the compiler places intermediate results."""
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def for_models(shardings: Shardings, mesh: Mesh | None) -> Shardings:
    """The shardings with automatic axes; if None, whole on every device of the mesh.

    Returns:
        A function for `with_shardings`. It raises a UserError if the shardings are not all of the
        same devices, the mesh's if there is one.
    """
    if shardings is None and mesh is not None and mesh.axis_names == AXES:
        shardings = partial(shard, mesh=mesh)
    if shardings is None:
        return None if mesh is None else NamedSharding(mesh, PartitionSpec())
    devices = set() if mesh is None else {tuple(mesh.devices.flat)}

    def chosen(like: dict) -> Any:
        tree = jax.tree.map(_automatic, _asked(shardings, like))
        leaves = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Sharding)]
        lists = devices | {_devices(leaf) for leaf in leaves}
        if len(lists) > 1:
            ids = " and ".join(sorted(str([device.id for device in held]) for held in lists))
            raise UserError(
                f"shardings and mesh are of the devices {ids}, expected the same ones in the same "
                "order; make every sharding from one mesh, the one given as `mesh`"
            )
        return tree

    return chosen


def _asked(shardings: Shardings, like: dict) -> Any:
    # A mesh can be called too: JAX makes a decorator of it.
    if isinstance(shardings, Mesh | AbstractMesh):
        raise UserError(
            f"shardings is the mesh {dict(shardings.shape)}, expected jax.sharding.Sharding; give "
            "NamedSharding(mesh, PartitionSpec(...)), or a tree of them"
        )
    return shardings(like) if callable(shardings) else shardings


def _automatic(sharding: Any) -> Any:
    if not isinstance(sharding, NamedSharding):
        return sharding
    if isinstance(sharding.mesh, AbstractMesh):
        raise UserError(
            f"a sharding is over {sharding.mesh}, which has no devices; make it from a "
            "jax.sharding.Mesh, such as jax.make_mesh((2, 4), ('data', 'model')) gives"
        )
    kind = sharding.memory_kind
    return NamedSharding(automatic(sharding.mesh), sharding.spec, memory_kind=kind)


def _devices(sharding: Sharding) -> tuple[jax.Device, ...]:
    """In the order that one computation's arguments must share."""
    if isinstance(sharding, NamedSharding):
        return tuple(sharding.mesh.devices.flat)
    return tuple(sorted(sharding.device_set, key=lambda device: device.id))


def with_shardings(like: dict, shardings: Shardings) -> dict:
    """The nested dict of `jax.ShapeDtypeStruct` with shardings in it; None leaves it as it is.

    Raises:
        UserError: the shardings are of other parameters, or cut a size that they do not divide.
    """
    chosen = _asked(shardings, like)
    if chosen is None:
        return like
    faults: list[str] = []
    places = _matched(like, chosen, (), faults)
    if faults:
        raise UserError(
            f"the shardings are not those of the parameters: {_first(faults)}; expected one "
            "jax.sharding.Sharding for all, or a tree of them like abstract_params(config) of "
            "qvgen_jax.models, or a function from such a tree to either: a packed transformer has "
            "other leaves, and takes the function"
        )
    check_cuts(like, places)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        like,
        places,
    )


def _matched(like: Any, shardings: Any, path: tuple[str, ...], faults: list[str]) -> Any:
    """The sharding of every leaf of `like`; what does not match goes into `faults`."""
    if isinstance(like, Mapping):
        if not isinstance(shardings, Mapping):
            shardings = dict.fromkeys(like, shardings)
        strange = sorted(str(name) for name in set(shardings) - set(like))
        faults += [f"{'.'.join((*path, name))} is no parameter" for name in strange]
        return {
            name: _matched(node, shardings.get(name), (*path, name), faults)
            for name, node in like.items()
        }
    if not isinstance(shardings, Sharding):
        given = "none" if shardings is None else repr(shardings)
        faults.append(f"{'.'.join(path)} {list(like.shape)} has {given}")
    return shardings


def check_cuts(like: dict, places: dict) -> None:
    """See that every sharding divides its parameter.

    Args:
        like: nested dict of `jax.ShapeDtypeStruct`.
        places: the same of shardings; None where there is none.

    Raises:
        UserError: one does not; the message names leaf, shape and sharding.
    """
    leaves = jax.tree_util.tree_leaves_with_path(like)
    shardings = jax.tree.leaves(places, is_leaf=lambda place: place is None)
    faults = [
        f"{'.'.join(part.key for part in path)} {list(leaf.shape)} by {_told(sharding)}"
        for (path, leaf), sharding in zip(leaves, shardings, strict=True)
        if sharding is not None and not _divides(sharding, leaf.shape)
    ]
    if faults:
        raise UserError(
            f"shardings cut parameters into unequal parts: {_first(faults)}; leave such an axis "
            "whole (None in the PartitionSpec), or take a mesh whose size divides it"
        )


def _divides(sharding: Sharding, shape: tuple[int, ...]) -> bool:
    if isinstance(sharding, NamedSharding) and len(sharding.spec) > len(shape):
        return False
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def _told(sharding: Sharding) -> str:
    if isinstance(sharding, NamedSharding):
        return f"{sharding.spec} of the mesh {dict(sharding.mesh.shape)}"
    return str(sharding)


def _first(faults: list[str]) -> str:
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more


def placed(network: Any, mesh: Mesh | None) -> Any:
    """The network with its arrays on the default device, or on every device of the mesh.

    There they are whole, but for those that are in slices on the same devices already.
    """
    if mesh is None:
        return dataclasses.replace(network, states=jax.device_put(network.states))
    whole, devices = NamedSharding(mesh, PartitionSpec()), tuple(mesh.devices.flat)

    def where(leaf: Any) -> Sharding:
        there = isinstance(leaf, jax.Array) and _devices(leaf.sharding) == devices
        return _automatic(leaf.sharding) if there else whole

    states = jax.device_put(network.states, jax.tree.map(where, network.states))
    return dataclasses.replace(network, states=states)


def mesh_of(states: Any) -> Mesh | None:
    """The mesh that these arrays lie on, of one device if they are whole on one.

    Kernels that XLA cannot partition need it where there are several devices (`kernels.partition`);
    None where there is one, or while JAX traces.
    """
    if jax.device_count() == 1:
        return None
    leaves = [leaf for leaf in jax.tree.leaves(states) if isinstance(leaf, jax.Array)]
    if not leaves or isinstance(leaves[0], jax.core.Tracer):
        return None
    for leaf in leaves:
        if isinstance(leaf.sharding, NamedSharding):
            return automatic(leaf.sharding.mesh)
    return Mesh(np.array(_devices(leaves[0].sharding)), ("device",), (AxisType.Auto,))


def run_where(function: Callable, states: Any, *arguments: Any) -> Any:
    """`function(states, *arguments)` on the devices of `states`, all arguments with them."""
    mesh = mesh_of(states)
    if mesh is None:
        return function(states, *arguments)
    whole, devices = NamedSharding(mesh, PartitionSpec()), tuple(mesh.devices.flat)

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or _devices(leaf.sharding) == devices:
            return leaf
        return jax.device_put(leaf, whole)

    arguments = jax.tree.map(moved, (states, *arguments))
    with jax.set_mesh(mesh):
        return function(*arguments)


def together(mesh: Mesh | None) -> int:
    """How many videos at once give every device something to do; batches are multiples of it.

    One per device; over a run's mesh all of them share one.
    """
    return 1 if mesh is None or mesh.axis_names == AXES else mesh.size


def spread(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows of the batch over all devices, or as `qvgen_jax.sharding.layout` says."""
    if mesh is None:
        return array
    axes = mesh.axis_names
    if axes == AXES:
        axes, _ = layout(len(array), mesh.shape)
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(axes)))


def spread_rows_of_pixels(latents: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Latents `[batch, frames, height, width, channels]` for the VAE: also cut along their height.

    Over a run's mesh alone; XLA exchanges the rows at the seams. As many of the axes as divide it.
    """
    if mesh is None or mesh.axis_names != AXES:
        return spread(latents, mesh)
    samples, left = layout(len(latents), mesh.shape)
    over: tuple[str, ...] = ()
    for axis in left:
        parts = math.prod(mesh.shape[name] for name in (*over, axis))
        if latents.shape[2] % parts == 0:
            over = (*over, axis)
    return jax.device_put(latents, NamedSharding(mesh, PartitionSpec(samples, None, over)))
