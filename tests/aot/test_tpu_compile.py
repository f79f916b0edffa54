"""The TPU kernels, compiled by libtpu for chips that are not attached, at real shapes."""

import importlib.util

import pytest

from kernels.shapes import of_models
from kernels.tpu_ahead import TOPOLOGIES, Case, compile_for
from kernels.tpu_slots import TARGET, total

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: jax[tpu]"
)

SMALL = (17776, 1920, 7680)
LARGE = (32760, 5120, 5120)
# The prologue with every real shape, as it holds the product too; then products of codes, also of
# other bits and of a few tokens.
CASES = (
    *(Case("tokens", *shape[2:]) for shape in of_models("Wan-1.3B 480p", "Wan-14B 480p")),
    *(Case("tokens", *shape[2:]) for shape in of_models("CogVideoX-2B")),
    Case("tokens", 32760, 13824, 1536, x_dtype="float32"),
    Case("codes", *SMALL),
    *(Case("codes", *LARGE, *bits) for bits in ((3, 3), (4, 8))),
    Case("codes", 512, 1536, 1536, 4, 8),
    Case("tokens", 512, 1536, 1536, 4, 8),
    Case("codes", 1, 129, 200),
    Case("tokens", 1, 129, 200),
    Case("codes", 512, 1024, 1536, 8, 8),
)
EIGHT = Case("codes", *LARGE, 8, 8)
XLA = Case("xla", *SMALL)  # What XLA makes of int8.


def cases_of(chip):
    """TPU7x refuses 8 bits of that length, whose sums float32 does not hold."""
    return CASES if chip == "tpu7x" else (*CASES, EIGHT)


def opcode(chip, case):
    if chip != "tpu7x":
        return "s4" if max(case.weight_bits, case.act_bits) <= 4 else "s8"
    return "f8e4m3fn" if max(case.weight_bits, case.act_bits) <= 4 else "bf16"


@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_every_real_product_compiles_to_the_narrowest_matrix_instruction(chip):
    for case, found in zip(cases_of(chip), compile_for(chip, cases_of(chip)), strict=True):
        # Among the errors would be a tile that does not fit into VMEM.
        assert not found.error, f"{case}: {found.error}"
        assert list(total(found).opcodes) == [opcode(chip, case)], case


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_int4_takes_about_half_of_the_slots_of_int8(chip):
    ours, xla = map(total, compile_for(chip, (Case("codes", *SMALL), XLA)))
    assert list(xla.opcodes) == ["s8"]
    assert ours.opcodes["s4"] <= TARGET * xla.opcodes["s8"]
    # Not less than half either: the count covers all of the product.
    assert ours.opcodes["s4"] >= 0.45 * xla.opcodes["s8"]
