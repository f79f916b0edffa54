"""The sizes of a run's mesh on so many devices, without the devices."""

from collections.abc import Mapping

from qvgen_jax.errors import UserError
from qvgen_jax.sharding import AXES

_DEFAULT = {"data": 1, "fsdp": -1, "context": 0, "tensor": 1}


def mesh_sizes(config: Mapping, devices: int) -> dict[str, int]:
    """Devices along each axis.

    Args:
        config: of the run; of its `mesh` section `fsdp` may be -1, what the others leave, and
            `context` 0, the fewest that let a batch's samples divide over the rest.
        devices: how many there are.

    Raises:
        UserError: the sizes do not make the number of devices, or the samples do not divide.
    """
    mesh = {**_DEFAULT, **config.get("mesh", {})}
    asked = {axis: mesh[axis] for axis in AXES}
    samples = config["train"]["batch_size"] // config["train"]["accumulate"]
    fixed = asked["data"] * asked["tensor"]
    if asked["context"] == 0:
        asked["context"] = _fewest(asked, samples, max(devices // fixed, 1))
    fixed *= asked["context"]
    if asked["fsdp"] == -1:
        asked["fsdp"] = max(devices // fixed, 1)
    told = ", ".join(f"{axis}={size}" for axis, size in asked.items())
    if fixed * asked["fsdp"] != devices:
        raise UserError(
            f"mesh is {told}, which is {fixed * asked['fsdp']} devices, and there are {devices}; "
            "give sizes whose product is the number of devices, or fsdp=-1"
        )
    groups = asked["data"] * asked["fsdp"]
    if samples % groups:
        raise UserError(
            f"mesh is {told}; {samples} samples (train.batch_size={config['train']['batch_size']} "
            f"in train.accumulate={config['train']['accumulate']} parts) do not divide over data x "
            f"fsdp = {groups} groups of devices; change one of them, or let more devices share a "
            "sample: a larger mesh.context"
        )
    return asked


def _fewest(asked: Mapping[str, int], samples: int, rest: int) -> int:
    """Of context, with which the samples divide over data x fsdp; 1 if none does."""
    if asked["fsdp"] != -1:
        return max(rest // asked["fsdp"], 1)
    fits = (n for n in range(1, rest + 1) if rest % n == 0)
    return next((n for n in fits if samples % (asked["data"] * rest // n) == 0), 1)
