"""Which backend takes a product, and what it says of those that do not."""

import logging

import pytest

from kernels import choose
from kernels.chips import CHIPS
from kernels.operands import Product


@pytest.mark.parametrize(
    ("chip", "backends"),
    [
        ("v5e", ("tpu", "xla")),
        ("tpu7x", ("tpu", "xla")),
        ("h200", ("hopper", "triton", "xla")),
        ("a100", ("triton", "xla")),
        ("rtx4090", ("triton", "xla")),
        ("b200", ("xla",)),
        ("cpu", ("xla",)),
    ],
)
def test_every_chip_has_its_backends_and_xla_at_the_end(chip, backends):
    assert choose.candidates(CHIPS[chip]) == backends


@pytest.mark.parametrize(
    ("chip", "backend", "layout"),
    [
        ("v6e", "tpu", "rows"),
        ("h200", "hopper", "columns"),
        ("a100", "triton", "columns_halved"),
        ("b200", "xla", "rows"),
        ("cpu", "xla", "rows_halved"),
    ],
)
def test_a_real_product_gets_the_chips_own_backend_and_layout(chip, backend, layout):
    found = choose.choose(Product(32760, 5120, 13824), CHIPS[chip])
    assert (found.backend, found.layout) == (backend, layout)
    unknown = choose.choose(Product(None, 5120, 13824), CHIPS[chip])
    assert unknown.layout == layout


def test_few_rows_go_to_xla_with_the_reason():
    found = choose.choose(Product(1, 5120, 30720), CHIPS["h200"])
    assert found.backend == "xla"
    assert "1 rows are fewer than 16" in found.reason


def test_a_backend_of_another_chip_is_refused_with_the_reason_and_an_unknown_one_by_name():
    found = choose.choose(Product(512, 64, 64), CHIPS["cpu"], "hopper")
    assert found.backend == "xla"
    assert "hopper does not: it has no kernel for cpu" in found.reason
    with pytest.raises(ValueError, match="backend='fast'; expected auto or one of xla"):
        choose.choose(Product(512, 64, 64), CHIPS["cpu"], "fast")


def test_a_fallback_is_said_once(caplog):
    with caplog.at_level(logging.WARNING, "kernels"):
        choose.say_once("a does not take b")
        choose.say_once("a does not take b")
    assert [record.message for record in caplog.records] == ["a does not take b"]
