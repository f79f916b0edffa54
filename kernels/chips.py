"""What each chip can do at best: peaks of their makers' data sheets, dense, per chip."""

from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """One accelerator, or a CPU.

    Attributes:
        name: as `--chip` takes it.
        platform: jax's: cpu, gpu or tpu.
        bf16, int8, int4, fp8: peak in 10^12 operations a second; 0 where there is no such unit.
        bandwidth: of its memory, 10^12 bytes a second.
        memory: 10^9 bytes.
        capability: of a GPU, major and minor; None otherwise.
    """

    name: str
    platform: str
    bf16: float
    int8: float
    int4: float
    fp8: float
    bandwidth: float
    memory: float
    capability: tuple[int, int] | None = None


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197, 394, 788, 0, 0.819, 16),
        Chip("v5p", "tpu", 459, 918, 1840, 0, 2.765, 95),
        Chip("v6e", "tpu", 920, 1840, 3680, 0, 1.64, 32),
        Chip("tpu7x", "tpu", 2310, 0, 0, 4610, 7.37, 192),
        Chip("a100", "gpu", 312, 624, 1248, 0, 2.04, 80, (8, 0)),
        Chip("rtx4090", "gpu", 165, 661, 1321, 661, 1.01, 24, (8, 9)),
        Chip("h100", "gpu", 989, 1979, 0, 1979, 3.35, 80, (9, 0)),
        Chip("h200", "gpu", 989, 1979, 0, 1979, 4.8, 141, (9, 0)),
        Chip("b200", "gpu", 2250, 4500, 0, 4500, 8.0, 192, (10, 0)),
        Chip("cpu", "cpu", 0, 0, 0, 0, 0, 0),
    )
}
"""By name. A CPU's peaks are not in a data sheet: they are 0, unknown."""

# What `jax.Device.device_kind` says, in lower case, and the chip; the first that occurs in it.
_KINDS = (
    ("tpu v5 lite", "v5e"),
    ("tpu v5e", "v5e"),
    ("tpu v5", "v5p"),
    ("tpu v6", "v6e"),
    ("tpu7x", "tpu7x"),
    ("tpu v7", "tpu7x"),
    ("a100", "a100"),
    ("4090", "rtx4090"),
    ("h100", "h100"),
    ("h200", "h200"),
    ("b200", "b200"),
    ("cpu", "cpu"),
)


def chip_of(device: jax.Device) -> Chip:
    """The chip that a device is.

    One that is not in the table keeps its platform and, of a GPU, its capability; its peaks are 0.
    """
    kind = device.device_kind.lower()
    for part, name in _KINDS:
        if part in kind:
            return CHIPS[name]
    capability = getattr(device, "compute_capability", None)
    major, _, minor = str(capability or "").partition(".")
    pair = (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None
    return Chip(device.device_kind, device.platform, 0, 0, 0, 0, 0, 0, pair)


def named(name: str) -> Chip:
    """The chip of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in CHIPS:
        raise ValueError(f"chip {name!r} is not known; known are {', '.join(CHIPS)}")
    return CHIPS[name]
