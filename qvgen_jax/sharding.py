"""One table from the names of parameters to the axes of a run's mesh, and what follows from it.

Samples go over data and fsdp, tokens over context; where there are fewer samples, as in inference,
tokens go over what they leave. Moments, averages, the teacher and what a checkpoint is restored
into lie like the parameters they belong to.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES

_SAMPLES = ("data", "fsdp")
TOKEN_BLOCK = 128
"""Tokens are padded to a multiple of context x this."""

# Input and output axis of a linear, by its dotted name. Column-parallel layers cut features apart
# over `tensor`, row-parallel ones sum over it; the other axis is cut over `fsdp`.
_LINEARS = (
    (r"blocks\.attn[12]\.to_[qkv]|blocks\.ffn\.up", ("fsdp", "tensor")),
    (r"blocks\.attn[12]\.to_out|blocks\.ffn\.down", ("tensor", "fsdp")),
    (r"proj_out", ("fsdp", None)),
    (r"condition_embedder\..*|time_embedding\..*|patch_embedding|patch_embed\..*", (None, "fsdp")),
    (r"blocks\.norm[12]\.linear|norm_out\.linear", (None, "fsdp")),
)
# Of a linear's leaves, which of (input, output) each dimension is; None for neither.
_LEAVES = {
    "kernel": ("in", "out"),
    "codes": ("in", "out"),  # Or the other way round in memory: they only lie there, cut somewhere.
    "bias": ("out",),
    "scale": ("out",),
    "zero_point": ("out",),
    "code_sum": ("out",),
    "L": ("out", None),
    "R": (None, "in"),
    "lower": (None,),
    "upper": (None,),
    "act_scale": (None,),
    "act_zero_point": (None,),
    "gate": (None,),
    "smooth": ("in",),
    "weight_levels": (),
    "act_levels": (),
}
# What every device has whole: a few vectors a layer.
_WHOLE = (
    r"blocks\.attn[12]\.norm_[qk]\.(scale|bias)"
    r"|blocks\.norm[12]\.norm\.(scale|bias)|blocks\.norm2\.(scale|bias)"
    r"|norm_final\.(scale|bias)|norm_out\.norm\.(scale|bias)"
    r"|(blocks\.)?scale_shift_table|timestep_table"
)

# Where blocks differ in bits they are several stacks (qvgen_jax/models/stack.py), cut alike.
_SEGMENT = r"^blocks\.from_\d+\."


def spec_of(path: str) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a parameter, by its dotted path; stacked ones included.

    Raises:
        UserError: the table has no such parameter.
    """
    layers = (None,) if path.startswith("blocks.") else ()
    path = re.sub(_SEGMENT, "blocks.", path)
    if re.fullmatch(_WHOLE, path):
        return layers  # Shorter than the shape: the rest is whole too.
    name, _, leaf = path.rpartition(".")
    for pattern, axes in _LINEARS:
        if leaf in _LEAVES and re.fullmatch(pattern, name):
            cut = dict(zip(("in", "out"), axes, strict=True))
            return (*layers, *(cut.get(role) for role in _LEAVES[leaf]))
    raise UserError(
        f"no rule says how the parameter {path} is cut over a mesh; add it to the table in "
        "qvgen_jax/sharding.py"
    )


def parameter_sharding(path: str, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """Where the parameter of this dotted path and shape lies.

    Raises:
        UserError: see `spec_of`; or a dimension does not divide over its axis.
    """
    spec = spec_of(path)
    for dimension, axis in enumerate(spec):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            size = mesh.shape[axis]
            fits = [n for n in range(1, size) if shape[dimension] % n == 0]
            raise UserError(
                f"{path} {list(shape)} does not divide over the mesh: dimension {dimension} is "
                f"{shape[dimension]}, the axis {axis} has {size} devices; take mesh.{axis}="
                f"{fits[-1]} or another divisor of {shape[dimension]}, and more along data"
            )
    return NamedSharding(mesh, P(*spec))


def shard(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a state, parameters or anything with their names in its paths.

    Args:
        tree: of arrays or `jax.ShapeDtypeStruct`. What stands before the parameters' own names
            (`params`, an optimizer's `mu`) is passed over; scalars are whole.

    Raises:
        UserError: see `parameter_sharding`.
    """

    def of_leaf(path: tuple, leaf: Any) -> NamedSharding:
        if leaf.ndim == 0:
            return NamedSharding(mesh, P())
        return parameter_sharding(_named(path), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def _named(path: tuple) -> str:
    """The dotted path of a parameter in a state, in parameters or in an optimizer's moments."""
    keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
    return ".".join(keys[1:] if keys[0] in _SECTIONS else keys)


_SECTIONS = ("params", "levels", "ema", "opt")  # Of a train state.


def samples(mesh: Mesh) -> NamedSharding:
    """Of arrays `[batch, ...]`: samples over data and fsdp."""
    return NamedSharding(mesh, P(_SAMPLES))


def place(tree: Any, mesh: Mesh | None) -> Any:
    """A state or parameters where `shard` puts them; as they are without a mesh."""
    return tree if mesh is None else jax.device_put(tree, shard(tree, mesh))


def described(tree: Any, mesh: Mesh | None) -> Any:
    """`jax.ShapeDtypeStruct` of a state, with the shardings of `place`: what to restore into."""
    if mesh is None:
        return tree
    return jax.tree.map(
        lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at),
        tree,
        shard(tree, mesh),
    )


def under(mesh: Mesh | None) -> AbstractContextManager:
    """The context in which a run's programs are traced: the mesh's, if there is one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def whole(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, P())


def layout(batch: int, axes: Mapping[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The axes that samples go over, and those that the tokens of each go over.

    Args:
        batch: number of samples.
        axes: sizes of the mesh.
    """
    over, others = [], []
    for axis in _SAMPLES:
        groups = _size((*over, axis), axes)
        (others if batch % groups else over).append(axis)
    return tuple(over), (*others, "context")


def laid_out(params: Any) -> Any:
    """Parameters, or what is like them, where `shard` puts them; while a program is traced."""
    if not axes_in_context():
        return params
    return jax.tree.map_with_path(lambda path, x: constrain(x, *spec_of(_named(path))), params)


def rows_here(mesh: Mesh, batch: int) -> list[int]:
    """Which rows of a batch the devices of this process hold."""
    here = samples(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (part,) in here for row in range(batch)[part]})


def from_rows(part: np.ndarray, rows: Sequence[int], batch: int, mesh: Mesh) -> jax.Array:
    """The array of a whole batch from the rows of `rows_here`, of every process its own."""
    place, at = {row: index for index, row in enumerate(rows)}, samples(mesh)
    part = np.asarray(part)

    def shard_of(index: tuple[slice, ...]) -> np.ndarray:
        return part[[place[row] for row in range(batch)[index[0]]]]

    return jax.make_array_from_callback((batch, *part.shape[1:]), at, shard_of)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` cut along these axes; under `jax.set_mesh` of a run's mesh, else as it is."""
    if not axes_in_context():
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def over_tokens(x: jax.Array) -> jax.Array:
    """`x [batch, tokens, features]` with samples and tokens as `layout` says."""
    axes = axes_in_context()
    return constrain(x, *layout(len(x), axes), None) if axes else x


def cut(x: jax.Array, parameter: str) -> jax.Array:
    """One layer's parameter where the table puts it; so does its gradient, without a detour.

    Args:
        x: the parameter, without the axis of stacked layers.
        parameter: its dotted path.
    """
    if not axes_in_context():
        return x
    return constrain(x, *_of_layer(parameter, x.ndim))


def gathered(x: jax.Array, parameter: str) -> jax.Array:
    """What stands for a parameter in a product, whole over fsdp; over tensor as the table says.

    Of a quantized layer these are its codes. Without this the compiler may as well gather the
    float32 master that they are rounded from.
    """
    if not axes_in_context():
        return x
    spec = _of_layer(parameter, x.ndim)
    # In its own type first: the compiler would else gather what it was converted from.
    x = constrain(x, *spec)
    return constrain(x, *(axis if axis == "tensor" else None for axis in spec))


def _of_layer(parameter: str, dimensions: int) -> tuple[str | None, ...]:
    spec = spec_of(parameter)
    return spec[len(spec) - dimensions :]


def pad_tokens(x: jax.Array) -> jax.Array:
    """`x [batch, tokens, features]` with zeros behind, so that every device has whole blocks.

    To a multiple of `TOKEN_BLOCK` times the devices that share a sample; as it is where each has
    one to itself.
    """
    axes = axes_in_context()
    shards = _size(layout(len(x), axes)[1], axes) if axes else 1
    if shards == 1:
        return x
    return jax.numpy.pad(x, ((0, 0), (0, -x.shape[1] % (shards * TOKEN_BLOCK)), (0, 0)))


def _size(names: tuple[str, ...], axes: Mapping[str, int]) -> int:
    return math.prod(axes[name] for name in names)


def axes_in_context() -> dict[str, int]:
    """Sizes of the mesh in the context, if it is a run's and not inside `shard_map`; else none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES:
        return {}
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return dict(mesh.shape)
