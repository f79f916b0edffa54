"""What remains of a cell when its checkpoints and videos are gone: one small JSON file.

`<study>/<stage>/<variant>-<bits>-<seed>.json`, tracked by git. A cell is done when its record is
there and was made with the config that the grid asks for now.
"""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from qvgen_jax.evaluation.drift import RESULT as HELD_OUT
from qvgen_jax.evaluation.report import read_metrics
from qvgen_jax.json_file import read_object
from qvgen_jax.study.grid import Cell, differences, digest, relevant

_CURVES = ("loss", "grad_norm", "rank", "gate", "small_singular_share", "lr_weights")
_CURVE_POINTS = 400  # More logged steps are thinned.
_DIGITS = 5


def path_of(study: Path, cell: Cell) -> Path:
    """Where a cell's record is."""
    return study / cell.stage / f"{cell.name}.json"


def failure_path(study: Path, cell: Cell) -> Path:
    """Where the last failure of a cell is, until it succeeds."""
    return study / cell.stage / f"{cell.name}.failed.json"


def read(path: Path) -> dict:
    """A record.

    Raises:
        UserError: it is no valid JSON.
    """
    return read_object(path, "delete it to run it again")


def read_stage(study: Path, stage: str) -> list[dict]:
    """All records of a stage, by file name."""
    paths = sorted((study / stage).glob("*.json"))
    return [read(path) for path in paths if not path.name.endswith(".failed.json")]


def outdated(study: Path, cell: Cell) -> str | None:
    """Why a cell must run, or None if its record is good."""
    path = path_of(study, cell)
    if not path.is_file():
        return "no result"
    found = differences(read(path)["config"], cell)
    return f"its config changed ({'; '.join(found[:3])})" if found else None


def write(path: Path, content: Mapping) -> None:
    """JSON with a line per key, so that a change is read in a diff; complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # The config to its last digit, or it would not be the one that is asked for.
    plain = {key: part if key == "config" else _plain(part) for key, part in content.items()}
    lines = [f"{json.dumps(key)}: {json.dumps(part)}" for key, part in plain.items()]
    partial = path.with_suffix(".tmp")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    partial.replace(path)


def _plain(value: Any) -> Any:
    """With few digits, and null where a number is not finite, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


def collect(
    cell: Cell,
    run: Path,
    command: str,
    code: Mapping,
    seconds: float,
    cpus: int | None,
    device: str | None,
) -> dict:
    """The record of a finished run.

    Args:
        run: its folder.
        command: as one would type it.
        code: `code_state()` when its process began.
        seconds: of the whole process that finished it.
        cpus: how many it was pinned to; None for not pinned.
        device: what it ran on, as JAX calls it.

    Raises:
        UserError: the run left no metrics.
    """
    records = read_metrics(run / "metrics.jsonl")
    evaluation, sizes = _json(run / "evaluation.json"), _json(run / "sizes.json")
    measured = _json(run / HELD_OUT) or {}
    return {
        "stage": cell.stage,
        "variant": cell.variant,
        "bits": cell.bits,
        "seed": cell.seed,
        "command": command,
        "digest": digest(cell.config),
        "config": relevant(cell.config),
        "code": dict(code),
        "versions": _versions(),
        "cpus": cpus,
        "device": device,
        "seconds": round(seconds, 1),
        "seconds_per_step": seconds_per_step(records),
        "curves": curves(records),
        "timesteps": measured.get("timesteps"),
        "held_out": measured.get("held_out"),
        "drift": measured.get("drift"),
        "judge": (evaluation or {}).get("variants"),
        "sizes": sizes,
    }


def _json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def code_state() -> dict:
    """The `commit` that is checked out and whether Python files differ from it (`dirty`).

    None outside git. Another commit does not outdate a record: most do not touch the numbers. What
    was interrupted and resumed has the code of its last start.
    """

    def git(*words: str) -> str | None:
        found = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return None if found.returncode else found.stdout.strip()

    changed = git("status", "--porcelain", "--", ":/*.py")
    return {"commit": git("rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}


def _versions() -> dict:
    names = ("jax", "jaxlib", "flax", "optax")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "machine": f"{platform.machine()}, {os.cpu_count()} cpus",
    }


def seconds_per_step(records: list[dict]) -> dict:
    """Medians over logged stretches, with and without the branch, and `mean` over the whole run.

    The first stretch of either kind is left out where there is another: it holds the compilation.
    """
    found, counts = {}, {}
    for kind, wanted in (("with_branch", True), ("without_branch", False)):
        rows = [record for record in records if bool(record["rank"]) == wanted]
        counts[kind] = len(rows)
        paces = [1 / row["steps_per_second"] for row in rows if row["steps_per_second"]]
        found[kind] = float(np.median(paces[1:] or paces)) if paces else None
    total = sum(counts[kind] * (found[kind] or 0) for kind in counts)
    return {**found, "mean": total / len(records)}


def curves(records: list[dict]) -> dict[str, list]:
    """`step` and the figures' curves, a number per kept step; null where none was logged."""
    stride = math.ceil(len(records) / _CURVE_POINTS)
    kept = records[::stride]
    return {
        name: [record.get(name) for record in kept]
        for name in ("step", *_CURVES)
        if any(name in record for record in kept)
    }


def curve_records(record: Mapping) -> list[dict]:
    """The curves as metrics.jsonl has them: a dict per step."""
    columns = record["curves"]
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]
