"""Runs the cells of a study that are missing, side by side, and keeps their records.

Every cell is a process of its own with a command that anyone can repeat. What cells can share they
share: the encoded clips, full precision's answers, and XLA's compiled programs.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from qvgen_jax.data.encode import MANIFEST
from qvgen_jax.data.moving_shapes import write_folder
from qvgen_jax.errors import UserError
from qvgen_jax.study import record
from qvgen_jax.study.grid import Cell, bits_name, differences, relevant, shown_command

_ERROR_LINES = 12
_PATIENCE = 60.0  # Seconds for an interrupted cell to finish its last checkpoint.
_POLL = 0.2
# In a new process, before it becomes the cell: its CPUs, and Ctrl-C, which a shell's background
# jobs ignore. Not by `preexec_fn`, which is not safe beside JAX's threads.
_START = """
import os, signal, sys
cpus, *command = sys.argv[1:]
if cpus:
    os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *command])
"""


class Outcome(NamedTuple):
    """How a start of a study ended: cells done now, done before, and those that failed."""

    done: list[Cell]
    kept: list[Cell]
    failed: list[Cell]


class _Running(NamedTuple):
    cell: Cell
    process: subprocess.Popen
    start: float
    log: Path
    cpus: tuple[int, ...] | None
    command: str
    code: dict


def prepare(grid: Mapping, cells: Sequence[Cell], environment: Mapping[str, str]) -> None:
    """Make the clips and encode them, once, before cells would do it side by side.

    Raises:
        UserError: the encoding failed; the message holds its last line.
    """
    for out, arguments in grid["clips"].items():
        if not (Path(out) / "captions.jsonl").is_file():
            print(f"drawing {arguments['count']} clips: {out}", flush=True)
            write_folder(out, **arguments)
    data, evaluate = cells[0].config["data"], cells[0].config["evaluate"]
    folders = [data["encoded"], *[evaluate["held_out_encoded"]] * bool(evaluate["held_out"])]
    if all((Path(folder) / MANIFEST).is_file() for folder in folders):
        return
    command = [*cells[0].command(Path(grid["scratch"]) / "encoding"), "--job", "encode"]
    result = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode:
        raise UserError(f"encoding failed: {' '.join(_last_lines(result.stdout, 1))}")


def environment_of(grid: Mapping) -> dict[str, str]:
    """What every cell gets beside the variables that are there: a shared cache of programs, and
    what the grid's `environment` says. Cells start in the same folder: the path may be relative,
    and no machine's is in a record."""
    return {
        **grid["environment"],
        "JAX_COMPILATION_CACHE_DIR": str(Path(grid["scratch"]) / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }


def device_kind(environment: Mapping[str, str]) -> str | None:
    """What cells run on, such as "cpu" or "NVIDIA H100 80GB HBM3"; None if JAX does not start.

    Asked in a process of its own: this one takes no memory of a GPU.
    """
    found = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return None if found.returncode else found.stdout.strip().splitlines()[-1]


def cpu_groups(count: int) -> list[tuple[int, ...] | None]:
    """The CPUs of each of `count` processes; None where they cannot, or need not, be divided."""
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if count == 1 or len(available) < count:
        return [None] * count
    return [tuple(available[index::count]) for index in range(count)]


def run_cells(
    grid: Mapping,
    study: Path,
    cells: Sequence[Cell],
    on_end: Callable[[], None],
    *,
    make_ready: Callable[..., None] = prepare,
) -> Outcome:
    """Run what is missing.

    Args:
        grid: reads `parallel`, `scratch`, `keep_cells`, `clips`, `environment`.
        study: the folder of the records.
        cells: all of them.
        on_end: called after every cell.
        make_ready: what happens before the first cell, as `prepare`.

    Returns:
        What was done; a cell that failed is tried again by the next start.

    Raises:
        UserError: another start of a study is at work in the same scratch folder.
        KeyboardInterrupt: after the cells that ran have stopped; they continue at the next start.
    """
    with _alone(Path(grid["scratch"])):
        return _run_cells(grid, study, cells, on_end, make_ready)


@contextmanager
def _alone(scratch: Path) -> Iterator[None]:
    """Keeps a second start out of the cells' folders; the kernel frees the lock with its holder."""
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another start of a study is at work in {scratch}; wait until it ends, or give "
                "this one its own --config.scratch"
            ) from error
        yield


def _run_cells(
    grid: Mapping,
    study: Path,
    cells: Sequence[Cell],
    on_end: Callable[[], None],
    make_ready: Callable[..., None],
) -> Outcome:
    reasons = {cell.name: record.outdated(study, cell) for cell in cells}
    kept = [cell for cell in cells if reasons[cell.name] is None]
    missing = [cell for cell in cells if reasons[cell.name] is not None]
    print(f"{len(kept)} of {len(cells)} cells are done", flush=True)
    for cell in missing:
        if reasons[cell.name] != "no result":
            print(f"{cell.name} runs again: {reasons[cell.name]}", flush=True)
    outcome = Outcome([], kept, [])
    if not missing:
        return outcome
    environment = environment_of(grid)
    make_ready(grid, cells, environment)
    device = device_kind(environment)
    waiting, running = deque(missing), {}
    groups = cpu_groups(grid["parallel"])
    began = time.monotonic()
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        while waiting or running:
            for slot, cpus in enumerate(groups):
                if waiting and slot not in running:
                    running[slot] = _start(grid, waiting.popleft(), environment, cpus)
            for slot in [s for s, run in running.items() if run.process.poll() is not None]:
                _finish(grid, study, running.pop(slot), outcome, device)
                _say_progress(outcome, len(cells), len(missing), time.monotonic() - began)
                on_end()
            time.sleep(_POLL)
    finally:
        signal.signal(signal.SIGTERM, previous)
        _stop([run.process for run in running.values()])
    return outcome


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _folder(grid: Mapping, cell: Cell) -> Path:
    """Of the run: its checkpoints, export and videos."""
    bits = bits_name(cell.bits)
    return Path(grid["scratch"]) / cell.stage / cell.variant / bits / str(cell.seed)


def _start(
    grid: Mapping, cell: Cell, environment: Mapping[str, str], cpus: tuple[int, ...] | None
) -> _Running:
    folder = _folder(grid, cell)
    _drop_other(folder, cell)
    log = Path(grid["scratch"]) / cell.stage / "logs" / f"{cell.name}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = cell.command(folder)
    code = record.code_state()  # Now: while the cell runs, somebody may commit.
    print(f"{cell.name}: started", flush=True)
    with log.open("w") as file:
        # A session of its own: Ctrl-C is for the runner, which then stops its cells one by one.
        process = subprocess.Popen(
            [sys.executable, "-c", _START, ",".join(map(str, cpus or ())), *command],
            env={**os.environ, **environment},
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    shown = shown_command(command, environment)
    return _Running(cell, process, time.monotonic(), log, cpus, shown, code)


def _drop_other(folder: Path, cell: Cell) -> None:
    """Delete what a run of another config left in the cell's folder."""
    path = folder / "config.json"
    if path.is_file() and differences(relevant(record.read(path)), cell):
        shutil.rmtree(folder)


def _finish(
    grid: Mapping, study: Path, run: _Running, outcome: Outcome, device: str | None
) -> None:
    """Record a cell whose process has ended."""
    cell, folder, code = run.cell, _folder(grid, run.cell), run.process.returncode
    failure = record.failure_path(study, cell)
    seconds = time.monotonic() - run.start
    cpus = None if run.cpus is None else len(run.cpus)
    lines = _last_lines(run.log.read_text(errors="replace"), _ERROR_LINES)
    found = None
    if code == 0:
        try:
            found = record.collect(cell, folder, run.command, run.code, seconds, cpus, device)
        except UserError as error:
            lines.append(str(error))
    if found is None:
        content = {"command": run.command, "exit_code": code, "seconds": seconds, "log": lines}
        record.write(failure, content)
        outcome.failed.append(cell)
        print(f"{cell.name}: failed with exit code {code}: {' '.join(lines[-1:])}", flush=True)
        return
    record.write(record.path_of(study, cell), found)
    failure.unlink(missing_ok=True)
    outcome.done.append(cell)
    print(f"{cell.name}: {seconds:.0f} s", flush=True)
    if not grid["keep_cells"]:
        shutil.rmtree(folder)


def _say_progress(outcome: Outcome, total: int, missing: int, seconds: float) -> None:
    ended = len(outcome.done) + len(outcome.failed)
    left = (missing - ended) * seconds / ended
    failed = f", {len(outcome.failed)} failed" if outcome.failed else ""
    done = len(outcome.kept) + len(outcome.done)
    print(f"{done} of {total} cells are done{failed}; about {left / 60:.0f} min left", flush=True)


def _last_lines(text: str, count: int) -> list[str]:
    return [line for line in text.splitlines() if line.strip()][-count:]


def _stop(processes: Sequence[subprocess.Popen]) -> None:
    """Ask each to stop, as Ctrl-C would, and wait for its last checkpoint."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + _PATIENCE
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
