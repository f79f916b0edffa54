"""The command line as a user meets it: one message, exit code 2, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

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
        ((*TINY, "extra"), "unexpected argument 'extra'"),
    ],
)
def test_wrong_arguments_get_one_line_and_exit_code_2(arguments, message):
    result = run(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config.model=assets/nowhere",), "assets/nowhere"),
        (("--config.data.source=assets/nowhere",), "assets/nowhere"),
        (("--config.quant.weight_bits=9",), "expected (weight bits, activation bits), 2 to 8"),
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
        (("--job", "pretrain"), "configs/tiny_pretrain.py"),
        (("--job", "plan", "--target", "v9:2x2"), "no chip 'v9' is known"),
        (("--job", "plan", "--target", "h200:3", "--config.mesh.context=1"), "samples"),
        (("--job", "plan", "--target", "h200:1", "--nocompile", "--plan_json", "no/p"), "no/p"),
        (("--config.train.remat=all",), "expected one of none, blocks, attention, offload"),
    ],
)
def test_wrong_values_are_told_before_anything_is_computed(arguments, message, tmp_path):
    result = run(*TINY, "--workdir", str(tmp_path / "run"), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    # The corrected command must not find the folder marked as another run's.
    assert not (tmp_path / "run" / "config.json").exists()


def test_generating_from_a_run_that_has_not_ended_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    result = run(*TINY, "--workdir", str(tmp_path), "--job", "generate", "--prompt", "a star")
    assert result.returncode == 2
    assert "run without an export" in result.stderr
