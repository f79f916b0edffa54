"""A run that is killed at a random step and started again ends as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVERRIDES = {
    "train.steps": 24,
    "train.batch_size": 4,
    "train.log_every": 1,
    "train.checkpoint_every": 3,
    "evaluate.videos": 2,
    "evaluate.round_to_nearest": False,
    "sample.count": 1,
    "sample.batch_size": 2,
}


def command(workdir: Path) -> list[str]:
    overrides = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
    config = ["--config", "configs/tiny_w4a4.py", "--workdir", str(workdir)]
    return [sys.executable, "main.py", *config, *overrides]


def metrics(workdir: Path) -> list[dict]:
    """All lines, complete ones only, without the speed."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.is_file() else ""
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in r.items() if not k.endswith("_per_second")} for r in records]


def verdict(workdir: Path) -> list[dict]:
    variants = json.loads((workdir / "evaluation.json").read_text())["variants"]
    return [{k: v for k, v in row.items() if k != "seconds_per_video"} for row in variants]


@pytest.mark.slow
def test_sigterm_saves_the_step_it_comes_in_and_changes_nothing(tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    subprocess.run(command(whole), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    process = subprocess.Popen(command(stopped), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (stopped / ".lock").is_file():
        time.sleep(0.02)
    second = subprocess.run(command(stopped), cwd=ROOT, capture_output=True, text=True)
    assert second.returncode == 2, second.stderr
    assert f"another run is at work in {stopped} (process {process.pid} on" in second.stderr
    while process.poll() is None and len(metrics(stopped)) < 10:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate()
    assert process.returncode == 75, told
    step = int(re.search(r"told to stop; step (\d+) is saved", told).group(1))
    assert (stopped / f"checkpoints/{step}").is_dir()
    assert len(metrics(stopped)) == step  # Not one of them is computed again.
    subprocess.run(command(stopped), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics(stopped) == metrics(whole)
    assert verdict(stopped) == verdict(whole)


@pytest.mark.slow
def test_sigkill_at_a_random_step_changes_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    step = random.Random(os.getpid()).randrange(4, 22)
    process = subprocess.Popen(command(killed), cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(metrics(killed)) < step:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run ended before it was killed"
    print(f"killed after {len(metrics(killed))} logged steps")

    subprocess.run(command(killed), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert metrics(killed) == metrics(whole)
    assert verdict(killed) == verdict(whole)
