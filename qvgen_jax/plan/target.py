"""The chips that a plan is for: `v5p:4x4x4`, `2xv6e:16x16`, `h200:8`, or this machine's."""

import math
import re
from typing import NamedTuple

import jax

from kernels.chips import CHIPS, Chip, chip_of
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import slices_of

GPUS_OF_A_NODE = 8
"""That share NVLink; beyond them is the network between nodes."""

# Sides of a TPU's grid. The newer small ones are 2-D, of at most 256 chips.
_SIDES = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_MOST_2D = 256
# Each of a TPU7x's two halves is a device of JAX's, with half of everything.
_DEVICES_OF_A_CHIP = {"tpu7x": 2}
_EXAMPLES = "v5p:4x4x4, 2xv6e:16x16, h200:8 or h100:32"
_SLICES = re.compile(r"([1-9]\d*)x(?=[a-z])")


class Target(NamedTuple):
    """Chips of one kind.

    Attributes:
        name: as `--target` has it; `here` for this machine.
        chip: one of them.
        chips: how many.
        devices: how many JAX sees.
        grid: of a TPU slice; empty otherwise.
        slices: of TPUs, with a network between them.
    """

    name: str
    chip: Chip
    chips: int
    devices: int
    grid: tuple[int, ...] = ()
    slices: int = 1

    @property
    def here(self) -> bool:
        """Whether it is this machine."""
        return self.name == "here"

    @property
    def of_a_slice(self) -> str:
        """The name of one of its slices."""
        return _SLICES.sub("", self.name)

    @property
    def memory(self) -> float:
        """Bytes of a device; 0 where it is not known."""
        return self.chip.memory * 1e9 * self.chips / self.devices

    @property
    def peak(self) -> float:
        """Operations a second of a device in bfloat16; 0 where it is not known."""
        return self.chip.bf16 * 1e12 * self.chips / self.devices

    def grown(self) -> "Target | None":
        """The next larger one: twice the chips of a slice; None where there is none, or it is
        `here`."""
        if self.here:
            return None
        if not self.grid:
            return parse_target(f"{self.chip.name}:{2 * self.chips}")
        *rest, side = sorted(self.grid, reverse=True)
        grid = (*rest, 2 * side)
        if len(grid) == 2 and math.prod(grid) > _MOST_2D:
            return None
        slices = f"{self.slices}x" * (self.slices > 1)
        return parse_target(f"{slices}{self.chip.name}:{'x'.join(map(str, sorted(grid)))}")


def parse_target(text: str) -> Target:
    """The target that `--target` names; "" is this machine.

    Raises:
        UserError: an unknown chip, or a number or grid of chips that there is not.
    """
    if not text:
        devices = jax.devices()
        count, chip = len(devices), chip_of(devices[0])
        slices = slices_of(devices) if chip.platform == "tpu" else 1
        return Target("here", chip, count, count, slices=slices)
    several = _SLICES.match(text)
    slices = int(several[1]) if several else 1
    name, _, size = text[several.end() if several else 0 :].partition(":")
    known = [chip for chip in CHIPS.values() if chip.platform != "cpu"]
    if name not in [chip.name for chip in known]:
        names = ", ".join(chip.name for chip in known)
        raise UserError(
            f"--target={text}: no chip {name!r} is known; expected one of {names}, such as "
            f"{_EXAMPLES}"
        )
    chip = CHIPS[name]
    if chip.platform == "gpu":
        if several:
            raise UserError(
                f"--target={text}: only TPUs come in slices; give the number of all GPUs after "
                "the colon, as in h100:16"
            )
        return Target(text, chip, *[_count(text, size)] * 2)
    grid = _grid(text, name, size)
    chips = slices * math.prod(grid)
    return Target(text, chip, chips, chips * _DEVICES_OF_A_CHIP.get(name, 1), grid, slices)


def _count(text: str, size: str) -> int:
    if not re.fullmatch(r"[1-9]\d*", size):
        raise UserError(f"--target={text}: expected a number of GPUs after the colon, as h200:8")
    count = int(size)
    if count > GPUS_OF_A_NODE and count % GPUS_OF_A_NODE:
        raise UserError(
            f"--target={text}: {count} GPUs are no whole nodes of {GPUS_OF_A_NODE}; take "
            f"{count // GPUS_OF_A_NODE * GPUS_OF_A_NODE} or another multiple"
        )
    return count


def _grid(text: str, name: str, size: str) -> tuple[int, ...]:
    sides, example = _SIDES[name], "x".join(["4"] * _SIDES[name])
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", size) or size.count("x") != sides - 1:
        raise UserError(
            f"--target={text}: {name} is ordered by a grid of {sides} sides, as in {name}:{example}"
        )
    grid = tuple(int(side) for side in size.split("x"))
    whole = all(side == 1 for side in grid) or all(side % 2 == 0 for side in grid[:2])
    if not whole or (sides == 2 and math.prod(grid) > _MOST_2D):
        most = f", at most {_MOST_2D} chips in all" if sides == 2 else ""
        raise UserError(
            f"--target={text}: the first two sides of a grid of {name} are even (a host has 2x2 "
            f"chips){most}; take {name}:{example} or another such grid"
        )
    return grid
