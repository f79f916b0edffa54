"""The least time of a product is that of the data sheets' peaks."""

import pytest

from kernels.chips import CHIPS
from kernels.floor import least_seconds, unit_of
from kernels.operands import Product


def test_floors_are_the_data_sheets():
    # 2 x 32760 x 5120 x 13824 operations at 989 and 1979 x 10^12 a second.
    product, chip = Product(32760, 5120, 13824), CHIPS["h200"]
    assert least_seconds(product, chip, "bf16", 2.0) == pytest.approx(4.69e-3, rel=1e-2)
    unit = unit_of("hopper", product, chip)
    assert (unit, unit_of("tpu", product, CHIPS["v6e"])) == ("int8", "int4")
    assert unit_of("tpu", product, CHIPS["tpu7x"]) == "fp8"
    assert least_seconds(product, chip, unit, 0.5) == pytest.approx(2.34e-3, rel=1e-2)
    # One row of a time embedder waits for its weight.
    few = Product(1, 5120, 30720)
    assert least_seconds(few, chip, "int8", 0.5) == pytest.approx(
        5120 * 30720 / 2 / 4.8e12, rel=1e-2
    )
