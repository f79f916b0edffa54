"""How long a step may take, from data sheets: a range, computed, never measured."""

from collections.abc import Sequence
from typing import NamedTuple

from qvgen_jax.plan.collectives import BETWEEN_SLICES, Collective
from qvgen_jax.plan.target import GPUS_OF_A_NODE, Target

UTILISATION = (0.25, 0.55)
"""Of the bfloat16 peak over a whole step, from slow to fast.

What large transformers reach on such chips, stretched downwards for the quantizers' element-wise
work, which no data sheet rates.
"""

# Of a chip's links to its neighbours, 10^9 bytes a second: TPUs' data sheets (1600, 4800, 3584 and
# 9600 Gb/s), one way of NVLink, and a network card of 400 Gb/s for each GPU between nodes.
_LINKS = {"v5e": 200, "v5p": 600, "v6e": 448, "tpu7x": 1200}
# Of the network between slices, for each chip: 25, 50, 100 and 100 Gb/s.
_BETWEEN_SLICES = {"v5e": 3.125, "v5p": 6.25, "v6e": 12.5, "tpu7x": 12.5}
_NVLINK = {"a100": 300, "h100": 450, "h200": 450, "b200": 900}
_BETWEEN_NODES = 50
_PCIE = 25
SHARE_OF_LINKS = (0.25, 0.8)
"""Of them that collectives reach, from slow to fast: a ring along one axis leaves links idle."""


class Pace(NamedTuple):
    """Seconds of a step, from fast to slow.

    Attributes:
        fast: the larger of computing and moving, each at its best and hidden behind the other.
        slow: their sum, each at its worst.
        computing, moving: both, from fast to slow.
    """

    fast: float
    slow: float
    computing: tuple[float, float]
    moving: tuple[float, float]


def pace(target: Target, operations: float, moved: Sequence[Collective]) -> Pace | None:
    """The range for a step.

    Args:
        target: whose peaks are known, else the answer is None.
        operations: of all devices; a multiply-add is two.
        moved: what arrives at each device.
    """
    if not target.peak:
        return None
    each = operations / target.devices / target.peak
    computing = each / UTILISATION[1], each / UTILISATION[0]
    arriving = sum(c.bytes / link(target, c.kind) for c in moved)
    moving = arriving / SHARE_OF_LINKS[1], arriving / SHARE_OF_LINKS[0]
    return Pace(max(computing[0], moving[0]), computing[1] + moving[1], computing, moving)


def link(target: Target, kind: str = "") -> float:
    """Bytes a second that arrive at a device from others at best, for a kind of collective."""
    name = target.chip.name
    if target.chip.platform == "tpu":
        links = _BETWEEN_SLICES if kind == BETWEEN_SLICES else _LINKS
        return links[name] * 1e9 * target.chips / target.devices
    if target.chips > GPUS_OF_A_NODE:
        return _BETWEEN_NODES * 1e9
    return _NVLINK.get(name, _PCIE) * 1e9
