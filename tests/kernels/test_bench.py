"""The benchmark runs every backend of this device and writes what it found."""

import json
import re

import pytest

from kernels import bench


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
    shown = [x for x in capsys.readouterr().out.splitlines() if "W4A4 xla linear" in x]
    assert len(shown) == 3
    assert all(re.search(r" of [1-3] repeats$", line) for line in shown)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "Sora"], "--model 'Sora': no such model, there are CogVideoX-2B"),
        (["--bits", "4"], "--bits '4': expected pairs of 2 to 8"),
        (["--bits", "4,9"], "--bits '4,9': expected pairs of 2 to 8"),
        (["--rows", "0"], "--rows 0: must be positive"),
        (["--quick", "--rows", "0"], "--rows 0: must be positive"),
        (["--rows", "100000"], "--rows 100000: no video asked for has more than 75600"),
        (["--quick", "--rows", "40000"], "--rows 40000: no video asked for has more than 32760"),
        (["--repeats", "0"], "--repeats 0: must be positive"),
        (["--budget", "nan"], "--budget nan: must be positive"),
        (["--budget", "0"], "--budget 0.0: must be positive"),
        (["--out", "."], "--out .: Is a directory; name a file to write"),
        (["--out", "README.md/result.json"], "--out README.md/result.json: "),
    ],
)
def test_wrong_arguments_are_one_message_and_exit_code_2(words, message, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run_shape", lambda *_: pytest.fail("something was timed"))
    assert bench.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_shape_with_fewer_rows_than_asked_for_says_so(capsys):
    shapes = bench.arguments_of(["--model", "Wan-14B 480p", "--rows", "2048"]).shapes
    assert [shape.rows for shape in shapes] == [2048, 2048, 2048, 512]
    assert capsys.readouterr().out == (
        "Wan-14B 480p, text key: all its 512 rows, which are fewer\n"
    )


def test_a_slow_call_is_warmed_up_once_and_timed_once():
    calls = []

    def call():
        calls.append(1)
        sum(range(300_000))
        return 0

    assert bench.median_seconds(call, 30, 1e-6)[1] == 1
    assert len(calls) == 2
    calls.clear()
    assert bench.median_seconds(call, 5, 10)[1] == 5
    assert len(calls) == 2 + 5
