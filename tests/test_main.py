"""The command line as a user meets it: one message, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import run_main

ROOT = Path(__file__).parents[1]
TINY = ("--config", "configs/tiny_w4a4.py")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no --config"),
        (("--config", "configs/nope.py"), "does not exist"),
        ((*TINY[:1], "configs/tiny_w4a4.py:fulll"), "not 'fulll'"),
        ((*TINY, "--config.train.stepz=3"), "did you mean 'steps'?"),
        ((*TINY, "--config.nope.x=3"), "no key 'nope'"),
        ((*TINY, "--config.train.steps=many"), "invalid literal"),
        ((*TINY, "--job", "trian"), "should be one of"),
        ((*TINY, "--jbo", "train"), "Did you mean: job"),
        ((*TINY, "--config.quant.bits.0=1"), "an override names no key of the config"),
        ((*TINY, "--config.=1"), "an override names no key of the config"),
        ((*TINY, "extra"), "unexpected argument 'extra'"),
    ],
)
def test_wrong_arguments_get_one_line_and_exit_code_2(arguments, message):
    result = run_main(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.model=assets/nowhere",), "assets/nowhere"),
        (("--config.data.source=assets/nowhere",), "assets/nowhere"),
        (("--config.quant.weight_bits=9",), "expected whole numbers of bits from 2 to 8"),
        (("--config.quant.decay_fraction=1.5",), "decay_fraction=1.5"),
        (("--config.train.steps=3", "--config.train.warmup_steps=0"), "less than one step"),
        (("--config.train.steps=3",), "the warm-up must end"),
        (("--config.train.accumulate=3",), "equal parts"),
        (("--config.quant.smoothing=1.5",), "expected a number from 0 to below 1"),
        (("--config.train.log_every=0",), "expected a whole number from 1"),
        (("--config.quant.branch_moments=rest",), "expected one of reset, rotate, keep"),
        (("--config.sample.prompts=nowhere.txt",), "one prompt per line"),
        (("--config.sample.count=-1",), "0 for no pairs of videos"),
        (("--config.evaluate.drift_videos=-1",), "0 for no drift"),
        (("--config.evaluate.held_out=assets/nowhere",), "assets/nowhere does not exist"),
        (("--job", "export"), "has no checkpoint"),
        (("--job", "generate"), "needs --prompt"),
        (("--job", "serve", "--port", "70000"), "--port is 70000, expected 1 to 65535"),
        (("--job", "serve", "--host", "192.0.2.1"), "cannot listen at 192.0.2.1:7860"),
        (("--job", "pretrain"), "configs/tiny_pretrain.py"),
        (("--job", "plan", "--target", "v9:2x2"), "no chip 'v9' is known"),
        (("--job", "plan", "--target", "h200:3", "--config.mesh.context=1"), "samples"),
        (("--job", "plan", "--target", "h200:1", "--nocompile", "--plan_json", "no/p"), "no/p"),
        (("--job", "sensitivity", "--candidates", "w16a16"), "expected w4a4, w4 (weights alone)"),
        (("--job", "mixed", "--budget", "5 apples"), "expected a number and one of bits, MB"),
        (("--job", "mixed", "--budget", "5bits"), "--job sensitivity with this --workdir makes it"),
        (("--config.quant.bits_file=nowhere.json",), "give the bits.json that --job mixed wrote"),
        (("--config.train.learning_rate.weights=nan",), "expected a number from 0 to below 100"),
        (("--config.train.clip_norm=0",), "expected a number above 0"),
        (("--config.train.caption_dropout=1.5",), "expected 0 to 1"),
        (("--config.train.shift=-1",), "expected above 0"),
        (("--config.train.batch_size=99999999999",), "from 1 to below 2^31"),
        (("--config.data.num_frames=0",), "from 1 to below 2^31"),
        (("--config.quant.bits=(1,)",), "such as (('blocks.attn1.to_q', 8, 8),)"),
        (("--config.quant.bits=(('blocks.attn1.to_q', 4, 16),)",), "bits from 2 to 8"),
        (("--config.quant.full_precision=(({},),)",), "expected names of layers"),
        (("--config.train.remat=all",), "expected one of none, blocks, attention, offload"),
    ],
)
def test_wrong_values_are_told_before_anything_is_computed(arguments, message, tmp_path):
    result = run_main(*TINY, "--workdir", str(tmp_path / "run"), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    # The corrected command must not find the folder marked as another run's.
    assert not (tmp_path / "run" / "config.json").exists()


CONFIG_FILES = {
    "def get_config(:": "does not run: SyntaxError: invalid syntax",
    "x = 1": "without a function get_config()",
    "def get_config(): return 3": "get_config() gave a int",
    "def get_config():\n    return 1 / 0": "division by zero",
    "import nothere": "No module named 'nothere'",
}


@pytest.mark.parametrize("text", CONFIG_FILES)
def test_a_config_file_that_is_none_is_told_in_one_line(tmp_path, text):
    (tmp_path / "mine.py").write_text(text)
    result = run_main("--config", str(tmp_path / "mine.py"))
    assert result.returncode == 2
    assert CONFIG_FILES[text] in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_config_file_without_a_key_that_training_reads_is_told_which(tmp_path):
    text = (
        "from configs.tiny_w4a4 import get_config as tiny\n\ndef get_config():\n"
        "    config = tiny().unlock()\n    del config.train.clip_norm\n    return config\n"
    )
    (tmp_path / "mine.py").write_text(text)
    result = run_main("--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run"))
    assert result.returncode == 2
    assert "the config has no train.clip_norm" in result.stderr


def test_help_lists_the_flags():
    result = run("--help")
    assert result.returncode == 0
    assert "--workdir" in result.stdout


def test_generating_from_a_run_that_has_not_ended_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = run(*TINY, "--workdir", str(tmp_path), "--job", "generate", "--prompt", "a star")
    assert result.returncode == 2
    assert "run without an export" in result.stderr
