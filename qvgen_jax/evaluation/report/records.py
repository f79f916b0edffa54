"""What a run wrote line by line: metrics, alarms and validations."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.report.curves import LEARNING_RATES
from qvgen_jax.evaluation.report.inputs import ALARM, METRICS, VALIDATION, check_shape
from qvgen_jax.json_file import parse_json

_NEVER_NEGATIVE = ("rank", *LEARNING_RATES)


def read_metrics(path: Path) -> list[dict]:
    """The logged steps in order. A step logged twice (a resumed run) counts once, as last logged;
    a line cut short by a kill is skipped. Ranks and learning rates that can be none, negative or
    not finite, count as not logged.

    Raises:
        UserError: nothing is left, or a line is not of the shape that training writes; it names
            the place.
    """
    if records := _checked(_by_step(path), METRICS, path):
        return [_possible(record) for record in records]
    raise UserError(
        f"{path} holds no logged step, and a report needs at least one. "
        f"Train first: python main.py --config <config> --workdir {path.parent}"
    )


def read_alarms(path: Path) -> list[dict]:
    """What training warned of: `step` and `alarm` each; none where there is no file.

    Raises:
        UserError: as `read_validation`.
    """
    return _checked([record for record in _records(path) if "alarm" in record], ALARM, path)


def read_validation(path: Path) -> list[dict]:
    """The validations in order, read as `read_metrics` does; none where there is no file.

    Raises:
        UserError: a line that is not of the shape that training writes; it names the place.
    """
    return _checked(_by_step(path), VALIDATION, path)


def _checked(records: list[dict], shape: dict, path: Path) -> list[dict]:
    for record in records:
        where = f"{path}, step {record['step']},"
        check_shape(record, shape, where, "remove that line, or the file")
    return records


def _possible(record: dict) -> dict:
    return {
        key: value
        for key, value in record.items()
        if key not in _NEVER_NEGATIVE or (value is not None and 0 <= value < math.inf)
    }


def _by_step(path: Path) -> list[dict]:
    latest = {record["step"]: record for record in _records(path)}
    return [latest[step] for step in sorted(latest)]


def _records(path: Path) -> Iterator[dict]:
    """Lines with a step; one that is none, cut short by a kill, is skipped."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield record
