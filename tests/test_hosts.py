"""Several real processes on loopback: found, training as one, and what the others say of a dead."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.hosts import join
from tests.cpu_devices import ON_CPU

ROOT = Path(__file__).parents[1]
STEPS = 6  # Ranks 2, 1, 0: the branch shrinks at step 2 and is gone at 4. Each is a compilation.


def start(count: int, workdir: Path, *arguments: str, devices: int = 4) -> list[subprocess.Popen]:
    """`count` processes of `tests/several_processes.py`, that share so many devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    rest |= ON_CPU | {"PYTHONPATH": str(ROOT), "DEVICES": str(devices // count)}
    if count > 1:
        rest |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.several_processes", str(workdir), str(STEPS), *arguments],
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
def alone(tmp_path_factory):
    """Losses of the first steps of one process with one device, by their number."""
    known: dict[int, list[float]] = {}

    def run(steps: int) -> list[float]:
        if steps not in known:
            workdir = tmp_path_factory.mktemp("alone")
            ((code, text),) = ended(start(1, workdir, "stop-at", str(steps), devices=1))
            assert code == 0, text
            known[steps] = losses(workdir)
        return known[steps]

    return run


def assert_the_same(workdir: Path, count: int, steps: int, alone: list[float]) -> None:
    for code, text in ended(start(count, workdir, "stop-at", str(steps))):
        assert code == 0, text
    np.testing.assert_allclose(losses(workdir), alone, rtol=1e-9)


@pytest.mark.by_hand
def test_two_processes_train_as_one(alone, tmp_path):
    assert_the_same(tmp_path, 2, 2, alone(2))


@pytest.mark.by_hand
@pytest.mark.parametrize(("count", "steps"), [(2, STEPS), (4, STEPS)])
def test_several_processes_train_as_one_while_the_branch_goes(alone, count, steps, tmp_path):
    assert_the_same(tmp_path, count, steps, alone(steps))


@pytest.mark.slow
def test_a_process_that_dies_is_told_by_the_others_and_the_run_goes_on(alone, tmp_path):
    (code, text), (dead, _) = ended(start(2, tmp_path, "die-at", "1"))
    assert dead == 1
    # By our message, where a step fails first; or by JAX's service, where heartbeats do.
    told = {75: "process 0 of 2 cannot go on without the others", -6: "another task died"}
    assert told[code] in text
    assert_the_same(tmp_path, 2, 2, alone(2))


@pytest.mark.by_hand
def test_one_process_that_is_told_to_stop_stops_all_and_the_run_goes_on(alone, tmp_path):
    processes = start(2, tmp_path)
    while all(each.poll() is None for each in processes) and not count_lines(tmp_path):
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    (code, text), (other, _) = ended(processes)
    assert (code, other) == (75, 75), text
    step = int(re.search(r"told to stop; step (\d+) is saved", text).group(1))
    assert 0 < step < STEPS
    assert len(losses(tmp_path)) == step
    assert_the_same(tmp_path, 2, step + 1, alone(step + 1))


def count_lines(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


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
