"""The mesh of a run, and one table from the names of parameters to its axes.

Axes, outermost first: `data` (whole copies), `fsdp` (samples and slices of every parameter),
`context` (tokens of a sample), `tensor` (features). Samples go over data and fsdp, tokens over
context. Moments, averages, the teacher and what a checkpoint is restored into lie like the
parameters they belong to.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvgen_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
SAMPLES = ("data", "fsdp")
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
    "bias": ("out",),
    "scale": ("out",),
    "zero_point": ("out",),
    "code_sum": ("out",),
    "L": ("out", None),
    "R": (None, "in"),
    "lower": (None,),
    "upper": (None,),
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


def make_mesh(
    sizes: Mapping[str, int],
    *,
    across_slices: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `AXES`.

    Args:
        sizes: devices along each axis, within a slice (or a node) where there are several. At most
            one may be -1: what the others leave.
        across_slices: the same across slices, over the slower network; `data` or `fsdp`.
        devices: all there are if None.

    Raises:
        UserError: the sizes do not make the number of devices, or name another axis.
    """
    devices = list(jax.devices() if devices is None else devices)
    outer = _sizes(across_slices or {}, "mesh.across_slices")
    if outer["context"] * outer["tensor"] > 1 or min(outer.values()) < 1:
        raise UserError(
            f"mesh.across_slices is {dict(across_slices)}; only data and fsdp may go over the "
            "network between slices, in sizes from 1: keep context and tensor in the mesh of a "
            "slice"
        )
    slices = outer["data"] * outer["fsdp"]
    inner = _filled(_sizes(sizes, "mesh"), len(devices), slices)
    shape = tuple(inner[axis] for axis in AXES)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, tuple(outer[axis] for axis in AXES), devices, allow_split_physical_axes=True
        )
    else:
        grid = _arranged(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Neighbours on the torus next to each other, where JAX finds a way; else in their order."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        return np.array(devices).reshape(shape)


def _sizes(given: Mapping[str, int], name: str) -> dict[str, int]:
    strange = [axis for axis in given if axis not in AXES]
    if strange:
        raise UserError(f"{name} has the axis {strange[0]!r}; expected {', '.join(AXES)}")
    return {axis: int(given.get(axis, 1)) for axis in AXES}


def _filled(sizes: dict[str, int], count: int, slices: int) -> dict[str, int]:
    told = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    known = int(np.prod([size for size in sizes.values() if size != -1]))
    if len(free) > 1 or known < 1:
        raise UserError(f"mesh is {told}; expected sizes from 1, and at most one -1")
    rest, left = divmod(count, known * slices)
    if left or rest < 1 or (rest > 1 and not free):
        over = f" in {slices} slices" if slices > 1 else ""
        raise UserError(
            f"mesh is {told}, {known} devices or a multiple of them, and there are {count}{over}; "
            "give sizes whose product is the number of devices, or -1 for one of them"
        )
    return sizes | {free[0]: rest} if free else sizes


def spec_of(path: str) -> tuple[str | None, ...]:
    """The mesh axis of each dimension of a parameter, by its dotted path; stacked ones included.

    Raises:
        UserError: the table has no such parameter.
    """
    layers = (None,) if path.startswith("blocks.") else ()
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
        keys = [part.key for part in path if isinstance(part, jax.tree_util.DictKey)]
        if keys[0] in _SECTIONS:
            keys = keys[1:]
        return parameter_sharding(".".join(keys), leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


_SECTIONS = ("params", "levels", "ema", "opt")  # Of a train state.


def samples(mesh: Mesh) -> NamedSharding:
    """Of arrays `[batch, ...]`: samples over data and fsdp."""
    return NamedSharding(mesh, P(SAMPLES))


def context_size() -> int:
    """Devices that share a sample's tokens, of the mesh in the context; 1 without one."""
    return axes_in_context().get("context", 1)


def constrain(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x` cut along these axes; under `jax.set_mesh` of a run's mesh, else as it is."""
    if not axes_in_context():
        return x
    return jax.lax.with_sharding_constraint(x, P(*axes))


def over_tokens(x: jax.Array) -> jax.Array:
    """`x [batch, tokens, features]`: samples over data and fsdp, tokens over context."""
    return constrain(x, SAMPLES, "context", None)


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


def pad_tokens(x: jax.Array, axis: int = 1) -> jax.Array:
    """Zeros behind the tokens, to a multiple of context x `TOKEN_BLOCK`; nothing without a mesh."""
    shards = context_size()
    if shards == 1:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % (shards * TOKEN_BLOCK))
    return jax.numpy.pad(x, widths)


def axes_in_context() -> dict[str, int]:
    """Sizes of the mesh in the context, if it is a run's and not inside `shard_map`; else none."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES:
        return {}
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return {}
    return dict(mesh.shape)
