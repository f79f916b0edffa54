"""`python -m kernels.explain`: its figures by hand, and one message for every wrong input."""

import pytest

from kernels.chips import CHIPS, Chip
from kernels.explain import ceiling, describe, explain, main, read_quantized, table
from kernels.floor import preparing_seconds
from kernels.operands import Product

WAN = "configs/wan1_3b_w4a4.py"
# A Hopper of round numbers: 1 and 2 x 10^12 operations, 10^11 bytes a second.
ROUND = Chip("round", "gpu", 1, 2, 0, 0, 0.1, 80, (9, 0))


def test_times_are_of_all_layers_and_the_larger_of_arithmetic_and_memory():
    layers = [("many", 3, Product(1000, 1000, 2000)), ("few", 1, Product(20, 1000, 1000))]
    many, few = explain(layers, ROUND)
    assert many.choice.backend == "hopper"
    # 2 x 1000 x 1000 x 2000 operations are 4 ms in bf16, 2 ms in int8, three times.
    assert (many.bf16, many.seconds) == pytest.approx((12e-3, 6e-3))
    # 4 x 10^7 operations are 40 us in bf16, and its 2 x 10^6 bytes of weights 20 us.
    assert few.bf16 == pytest.approx(40e-6)
    # One token is all memory: a weight's 5 x 10^5 bytes in int4, 2 x 10^6 in bf16, its own 4000.
    (one,) = explain([("one", 2, Product(1, 1000, 1000))], ROUND)
    assert one.choice.backend == "xla"
    assert (one.seconds, one.bf16) == pytest.approx((2 * 5.04e-6, 2 * 20.04e-6))


def test_the_ceiling_adds_attention_in_bf16_to_both_sides():
    rows = explain([("many", 3, Product(1000, 1000, 2000))], ROUND)
    text = ceiling(rows, 12e-3)
    assert "Linears at best 6.0 ms, in bf16 12.0 ms: 2.00x" in text
    assert "Attention in bf16 12.0 ms, 50 % of the two" in text
    assert "the transformer is at best 1.33x" in text  # (12 + 12) / (6 + 12)


def test_smoothing_and_rotation_are_added_to_the_low_bits_alone():
    product = Product(1000, 1000, 2000)
    # 2 x 10^6 bytes in and out are 40 us; 2 x 10^6 x 256 operations 512 us.
    assert preparing_seconds(product, ROUND, 1) == pytest.approx(40e-6)
    assert preparing_seconds(product, ROUND, 256) == pytest.approx(512e-6)
    assert preparing_seconds(product, ROUND._replace(bf16=0), 256) is None
    text = ceiling(explain([("many", 3, product)], ROUND), 12e-3, 2e-3)
    expected = "Linears at best 8.0 ms (2.0 of them smoothing and rotation), in bf16 12.0 ms: 1.50x"
    assert expected in text
    assert "at best 1.20x" in text  # (12 + 12) / (8 + 12)


def test_a_config_that_prepares_its_tokens_is_told_what_it_costs():
    config = read_quantized(WAN)
    bare = {**config, "quant": {**config["quant"], "rotation": "none", "smoothing": 0.0}}
    assert "of them smoothing and rotation" in describe(config, CHIPS["h200"])
    assert "of them smoothing and rotation" not in describe(bare, CHIPS["h200"])


def test_rows_of_one_linear_say_their_bits_where_blocks_differ():
    four, eight = Product(64, 64, 64, 4, 4), Product(64, 64, 64, 8, 8)
    text = table(explain([("up", 3, four), ("up", 1, eight), ("down", 4, four)], ROUND))
    assert [line.split(" x")[0].rstrip() for line in text.splitlines()[1:4]] == [
        "up W4A4",
        "up W8A8",
        "down",
    ]


def test_a_chip_without_peaks_has_no_times():
    rows = explain([("one", 1, Product(64, 64, 64))], ROUND._replace(bf16=0, int8=0))
    assert rows[0].seconds is None
    assert table(rows).splitlines()[1].split()[-3:] == ["unknown", "unknown", "[1]"]
    assert "no floor" in ceiling(rows, None)


def test_a_real_model_adds_up_to_what_its_sizes_say(capsys):
    assert main([WAN, "--chip", "h200"]) == 0
    last = capsys.readouterr().out.splitlines()[-1].split()
    linears, attention = (float(last[i + 1]) for i, word in enumerate(last) if word == "bf16")
    # 49 frames at 480 x 832. Six products of d x d a block and the MLP's two; those of text and
    # timesteps are the rest, under 1 %. 989 x 10^12 operations a second.
    tokens, dim, hidden = 13 * 30 * 52, 1536, 8960
    operations = 30 * 2 * tokens * (6 * dim**2 + 2 * dim * hidden)
    assert linears == pytest.approx(operations / 989e9, rel=0.01)
    operations = 30 * 4 * dim * (tokens**2 + tokens * 512)
    assert attention == pytest.approx(operations / 989e9, abs=0.05)  # Printed to 0.1.


def test_the_configs_own_kernels_are_asked_and_the_flag_overrules_them(tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "from configs.wan1_3b_w4a4 import get_config as theirs\n"
        "def get_config(arg=''):\n"
        "    config = theirs(arg)\n"
        "    config.kernels = 'xla'\n"
        "    return config\n"
    )
    assert main([str(own), "--chip", "h200"]) == 0
    assert " hopper " not in capsys.readouterr().out
    assert main([str(own), "--chip", "h200", "--kernels", "hopper"]) == 0
    assert " hopper " in capsys.readouterr().out
    with pytest.raises(ValueError, match="backend='fast'; expected auto or one of xla"):
        describe(read_quantized(WAN) | {"kernels": "fast"}, ROUND)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "configs/nope.py",
            "config file 'configs/nope.py' does not exist; "
            "run from the repository's root and name one of configs",
        ),
        ("README.md", "'README.md' is no Python file; name one of configs/*.py"),
        ("kernels/floor.py", "'kernels/floor.py' has no get_config, so is no config"),
        ("configs/study_tiny.py", "has no model, data, quant; name one that quantizes"),
        (f"{WAN}:nope", "knows one of released, plain_qat"),
    ],
)
def test_what_is_no_config_is_one_message_and_exit_code_2(config, message, capsys):
    assert main([config]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_config_that_does_not_run_says_why(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0\n")
    assert main([str(broken)]) == 2
    assert "does not run: ZeroDivisionError: division by zero" in capsys.readouterr().err


def test_attention_that_the_environment_asks_for_in_vain_is_one_message(monkeypatch, capsys):
    monkeypatch.setenv("QVGEN_ATTENTION", "nope")
    assert main([WAN, "--chip", "h200"]) == 2
    assert "QVGEN_ATTENTION='nope': 'nope' is none of" in capsys.readouterr().err
    monkeypatch.setenv("QVGEN_ATTENTION", "tokamax")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main([WAN, "--chip", "h200"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: QVGEN_ATTENTION: no attention backend that was asked for")
    assert "add xla to the order" in error
