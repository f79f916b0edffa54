"""Several real processes on loopback: found, training as one, and what the others say of a dead."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.hosts import join

ROOT = Path(__file__).parents[1]
STEPS = 6  # Ranks 2, 1, 0: the branch shrinks at step 2 and is gone at 4. Each is a compilation.


def start(
    count: int, workdir: Path, steps: int, *arguments: str, devices: int = 4
) -> list[subprocess.Popen]:
    """`count` processes of `tests/several_processes.py`, that share so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    rest |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "DEVICES": str(devices // count)}
    if count > 1:
        rest |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.several_processes", str(workdir), str(steps), *arguments],
            cwd=ROOT,
            env=rest | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(count)
    ]


def ended(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """Exit code and output of each; killed after five minutes."""
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, text) for p, text in zip(processes, outputs, strict=True)]


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").open()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    """Losses of one process with one device."""
    workdir = tmp_path_factory.mktemp("alone")
    ((code, text),) = ended(start(1, workdir, STEPS, devices=1))
    assert code == 0, text
    return losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(("count", "steps"), [(2, STEPS), (4, 2)])
def test_several_processes_train_as_one(alone, count, steps, tmp_path):
    for code, text in ended(start(count, tmp_path, STEPS, "stop-at", str(steps))):
        assert code == 0, text
    np.testing.assert_allclose(losses(tmp_path), alone[:steps], rtol=1e-9)


@pytest.mark.slow
def test_a_process_that_dies_is_told_by_the_others_and_the_run_goes_on(alone, tmp_path):
    (code, text), (dead, _) = ended(start(2, tmp_path, STEPS, "die-at", "1"))
    assert dead == 1
    assert code == 75, text
    assert "process 0 of 2 cannot go on without the others" in text
    for code, text in ended(start(2, tmp_path, STEPS, "stop-at", "2")):
        assert code == 0, text
    np.testing.assert_allclose(losses(tmp_path), alone[:2], rtol=1e-9)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("10.0.0.1:8476", "", ""), "JAX_COORDINATOR_ADDRESS is set and JAX_NUM_PROCESSES, JAX_PR"),
        (("10.0.0.1:8476", "2", "2"), "JAX_NUM_PROCESSES=2 and JAX_PROCESS_ID=2; expected whole"),
        (("10.0.0.1", "2", "1"), "JAX_COORDINATOR_ADDRESS=10.0.0.1; expected host:port"),
    ],
)
def test_half_an_address_is_refused(given, message):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    with pytest.raises(UserError, match=message):
        join(dict(zip(names, given, strict=True)))


def test_one_task_of_a_launcher_runs_alone():
    join({"SLURM_STEP_NUM_TASKS": "1", "TPU_WORKER_HOSTNAMES": "localhost"})
