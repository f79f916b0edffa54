"""The benchmark runs every backend of this device and writes what it found."""

import json
import logging

import pytest

from kernels import bench, choose
from kernels.chips import CHIPS, chip_of, named
from kernels.floor import least_seconds, unit_of
from kernels.operands import Product


def test_a_small_run_writes_ratios_memory_device_and_command(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    words = ["--quick", "--rows", "4", "--repeats", "3", "--budget", "0.05", "--out", str(out)]
    assert bench.main(words) == 0
    found = json.loads(out.read_text())
    assert found["versions"]["jax"]
    assert found["command"].startswith("python -m kernels.bench --quick --rows 4")
    calls = {record["call"] for record in found["records"]}
    assert {"W4A4 xla product", "W4A4 xla linear", "W4A16 xla", "bfloat16 jnp.dot"} <= calls
    up = {r["call"]: r for r in found["records"] if r["layer"] == "ffn up"}
    assert up["W4A4 xla linear"]["weight_bytes"] == 1536 * 8960 // 2
    assert up["bfloat16 jnp.dot"]["weight_bytes"] == 1536 * 8960 * 2
    assert all(record["ms"] > 0 and record["to_float32"] > 0 for record in found["records"])
    assert "W4A4 xla linear" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "Sora"], "no such model, there are CogVideoX-2B"),
        (["--bits", "4"], "expected pairs of 2 to 8"),
        (["--bits", "4,9"], "expected pairs of 2 to 8"),
        (["--rows", "0", "--repeats", "0"], "must be positive"),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(words, message, capsys):
    assert bench.main(words) == 2
    assert message in capsys.readouterr().err


def test_a_slow_call_is_made_once():
    calls = []

    def call():
        calls.append(1)
        sum(range(300_000))
        return 0

    assert bench.median_seconds(call, 30, 1e-6)[1] == len(calls) == 1
    assert bench.median_seconds(lambda: 0, 5, 10)[1] == 5


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
    assert choose.candidates(chip) == ("triton", "xla")
    assert least_seconds(Product(8, 8, 8), chip, "int8", 0.5) is None
    with pytest.raises(ValueError, match="'gtx' is not known; known are v5e"):
        named("gtx")


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
