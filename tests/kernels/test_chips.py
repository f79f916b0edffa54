"""A chip is known by what its device calls itself, and by its own name."""

import pytest

from kernels.chips import chip_of, named
from kernels.choose import candidates
from kernels.floor import least_seconds
from kernels.operands import Product


class _Device:
    def __init__(self, kind, platform="tpu", capability=None):
        self.device_kind, self.platform = kind, platform
        if capability:
            self.compute_capability = capability


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v5p", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("cpu", "cpu"),
    ],
)
def test_a_device_is_known_by_its_kind(kind, name):
    assert chip_of(_Device(kind)).name == name


def test_an_unknown_gpu_keeps_its_capability_and_has_no_floor():
    chip = chip_of(_Device("NVIDIA L40S", "gpu", "8.9"))
    assert (chip.name, chip.capability) == ("NVIDIA L40S", (8, 9))
    assert candidates(chip) == ("triton", "xla")
    assert least_seconds(Product(8, 8, 8), chip, "int8", 0.5) is None
    with pytest.raises(ValueError, match="'gtx' is not known; known are v5e"):
        named("gtx")
