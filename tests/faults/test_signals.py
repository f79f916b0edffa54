"""Runs that are killed or told to stop and started again end as if nothing had happened.

A few of what `benchmarks/faults.py` does by the hundred.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from benchmarks.faults import Scene, end_runs, fingerprint, last_step, nothing_yet

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return Scene(tmp_path_factory.mktemp("scene"))


@pytest.fixture(scope="module")
def seconds(scene) -> float:
    return scene.undisturbed("whole")


@pytest.fixture(scope="module")
def whole(scene, seconds) -> dict:
    return fingerprint(scene.folder / "whole")


def test_sigkill_at_random_moments_changes_nothing(scene, seconds, whole):
    so_far, seed = nothing_yet(), os.getpid()
    end_runs(scene, signal.SIGKILL, so_far, seed, whole, seconds, times=2)
    print(f"seed {seed}: {so_far}")
    assert so_far["lost"] == so_far["different"] == 0


def test_sigterm_saves_the_step_it_comes_in_and_changes_nothing(scene, whole):
    workdir, told = scene.folder / "stopped", scene.folder / "stopped.txt"
    with told.open("w") as file:
        process = scene.start(workdir, file)
        wait_for(process, lambda: (workdir / ".lock").is_file())
        assert_a_second_one_is_refused(scene, workdir, process.pid)
        wait_for(process, lambda: last_step(workdir) >= 9)
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 75, told.read_text()
    step = int(re.search(r"told to stop; step (\d+) is saved", told.read_text()).group(1))
    assert (workdir / f"checkpoints/{step}").is_dir()
    assert last_step(workdir) == step - 1  # Not one of them is computed again.
    assert scene.start(workdir).wait() == 0
    assert fingerprint(workdir) == whole


def wait_for(process: subprocess.Popen, moment) -> None:
    while process.poll() is None and not moment():
        time.sleep(0.01)
    assert process.poll() is None, "the run ended before the moment came"


def assert_a_second_one_is_refused(scene: Scene, workdir: Path, holder: int) -> None:
    told = scene.folder / "second.txt"
    with told.open("w") as file:
        assert scene.start(workdir, file).wait() == 2
    assert f"another run is at work in {workdir} (process {holder} on" in told.read_text()
