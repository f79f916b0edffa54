"""The mesh of a run: how many devices share what.

Axes, outermost first: `data` (whole copies), `fsdp` (samples and slices of every parameter),
`context` (tokens of a sample), `tensor` (features).
"""

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from qvgen_jax.errors import UserError

AXES = ("data", "fsdp", "context", "tensor")
_ACROSS = ("data", "fsdp")  # What may go over the network between slices.


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
        UserError: the sizes do not make the number of devices, or name another axis; or the devices
            are of another number of slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    outer = _outer(across_slices or {})
    slices = math.prod(outer.values())
    # Nodes of GPUs may well be one mesh: their network is as flat.
    if slices > 1 or devices[0].platform == "tpu":
        check_slices(outer, slices_of(devices), f"the {len(devices)} devices")
    inner = _filled(_sizes(sizes, "mesh"), len(devices), slices)
    shape = tuple(inner[axis] for axis in AXES)
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(
            shape, tuple(outer[axis] for axis in AXES), devices, allow_split_physical_axes=True
        )
    else:
        grid = _arranged(shape, devices)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_of_config(config: Mapping, devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """The mesh of a training run; None where there is one device.

    Args:
        config: see `sizes_of_config`.
        devices: all there are if None.

    Raises:
        UserError: see `make_mesh` and `sizes_of_config`.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len(devices) == 1:
        return None
    sizes, outer = _of_config(config, len(devices))
    return make_mesh(sizes, across_slices=outer, devices=devices)


def sizes_of_config(config: Mapping, count: int) -> dict[str, int]:
    """Devices along each axis of a training run on `count` of them, over all slices.

    Args:
        config: reads `mesh`: sizes by axis, of which `fsdp` may be -1, what the others leave, and
            `context` 0, the fewest that share a sample; `mesh.across_slices`; and
            `train.batch_size` and `accumulate`.
        count: how many there are.

    Raises:
        UserError: the sizes do not make that number, or the samples do not divide over data and
            fsdp.
    """
    sizes, outer = _of_config(config, count)
    return {axis: sizes[axis] * outer[axis] for axis in AXES}


def _of_config(config: Mapping, count: int) -> tuple[dict[str, int], dict[str, int]]:
    """Sizes within a slice and across them."""
    train, outer = config["train"], _outer(config["mesh"]["across_slices"])
    sizes, slices = {axis: config["mesh"][axis] for axis in AXES}, math.prod(outer.values())
    samples = train["batch_size"] // train["accumulate"]
    if sizes["context"] == 0:
        sizes["context"] = _fewest(sizes, samples, count // slices, slices)
    sizes = _filled(sizes, count, slices)
    groups = slices * sizes["data"] * sizes["fsdp"]
    if samples % groups:
        raise UserError(
            f"train.batch_size={train['batch_size']} in accumulate={train['accumulate']} parts is "
            f"{samples} samples at once, which do not divide over data x fsdp = {groups} groups of "
            "devices; change one of them, or let more devices share a sample: a larger mesh.context"
        )
    return sizes, outer


def mesh_to_generate(devices: Sequence[jax.Device] | None = None) -> Mesh | None:
    """All devices for one video; of an even number, half for either branch of guidance.

    Args:
        devices: all there are if None; one process's own where each makes other videos.

    Raises:
        UserError: they are of several TPU slices.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if devices[0].platform == "tpu" and (slices := slices_of(devices)) > 1:
        raise UserError(
            f"the {count} devices are of {slices} slices, and a video is made within one: start "
            "the job on one slice alone"
        )
    return None if count == 1 else make_mesh(sizes_to_generate(count), devices=devices)


def sizes_to_generate(count: int) -> dict[str, int]:
    """Devices along each axis of `mesh_to_generate` on `count` of them."""
    branches = 2 - count % 2
    return {"data": branches, "fsdp": count // branches, "context": 1, "tensor": 1}


def _fewest(sizes: Mapping[str, int], samples: int, devices: int, slices: int) -> int:
    """The least size of context with which the samples divide over the other devices."""
    rest = devices // max(sizes["data"] * sizes["tensor"], 1)
    if sizes["fsdp"] != -1:
        return max(rest // max(sizes["fsdp"], 1), 1)
    fits = (
        context
        for context in range(1, rest + 1)
        if rest % context == 0 and samples % (slices * sizes["data"] * rest // context) == 0
    )
    return next(fits, 1)  # If none does, the error about the samples follows.


def _arranged(shape: tuple[int, ...], devices: list[jax.Device]) -> np.ndarray:
    """Neighbours on the torus next to each other, where JAX finds a way; else in their order."""
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except (NotImplementedError, ValueError):
        return np.array(devices).reshape(shape)


def _outer(given: Mapping[str, int]) -> dict[str, int]:
    outer = _sizes(given, "mesh.across_slices")
    if outer["context"] * outer["tensor"] > 1 or min(outer.values()) < 1:
        raise UserError(
            f"mesh.across_slices is {dict(given)}; only data and fsdp may go over the network "
            "between slices, in sizes from 1: keep context and tensor in the mesh of a slice"
        )
    return outer


def check_slices(across_slices: Mapping[str, int], there: int, what: str) -> None:
    """Refuse a mesh for another number of slices than there are.

    Args:
        across_slices: of a config's mesh.
        there: how many slices there are.
        what: has them, such as "the 8 devices".

    Raises:
        UserError: see above.
    """
    outer = _outer(across_slices)
    if math.prod(outer.values()) == there:
        return
    told = ", ".join(f"{axis}={outer[axis]}" for axis in _ACROSS)
    one, other = (
        f"--config.mesh.across_slices.data={data} --config.mesh.across_slices.fsdp={fsdp}"
        for data, fsdp in ((there, 1), (1, there))
    )
    raise UserError(
        f"mesh.across_slices is {told}, and {what} are of {there} slice{'s' * (there > 1)}: it "
        "says what goes over the network between slices; set "
        + (one if there == 1 else f"{one}, or {other}")
    )


def slices_of(devices: Sequence[jax.Device]) -> int:
    """How many slices (of GPUs: nodes) the devices are of."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def _sizes(given: Mapping[str, int], name: str) -> dict[str, int]:
    strange = [axis for axis in given if axis not in AXES]
    if strange:
        raise UserError(f"{name} has the axis {strange[0]!r}; expected {', '.join(AXES)}")
    return {axis: int(given.get(axis, 1)) for axis in AXES}


def _filled(sizes: dict[str, int], count: int, slices: int) -> dict[str, int]:
    told = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or known < 1:
        raise UserError(f"mesh is {told}; expected sizes from 1, and at most one -1")
    rest, left = divmod(count, known * slices)
    if left or rest < 1 or (rest > 1 and not free):
        over = f" in {slices} slices" if slices > 1 else ""
        known = f"{known} devices" + (" or a multiple of them" if free else "")
        raise UserError(
            f"mesh is {told}, {known}, and there are {count}{over}; "
            "give sizes whose product is the number of devices, or -1 for one of them"
        )
    return sizes | {free[0]: rest} if free else sizes


def told(mesh: Mesh) -> str:
    """One line about a mesh: its sizes, and what goes over them."""
    sizes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1)
    return f"{mesh.size} devices: {sizes} (samples over data and fsdp, tokens over context)"
