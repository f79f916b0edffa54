"""A folder that grows beside its target, with a record of what in it is done.

The record's first line says what is being made from what; each further line is written when its
part is safe on disk. The folder gets its name when it is whole.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from qvgen_jax.errors import UserError

_RECORD = "progress.jsonl"


def write_durably(path: Path, text: str) -> None:
    """Writes a file so that it is there whole or not at all, even if the power fails."""
    partial = path.with_name(path.name + ".tmp")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def start(target: Path, task: dict[str, Any]) -> tuple[Path, list[dict]]:
    """Makes `TARGET.partial`, or goes on in what an interrupted call left there.

    Args:
        target: the folder to become.
        task: what tells this conversion from any other, as JSON.

    Returns:
        The folder to work in, and the records of what is done already.

    Raises:
        UserError: what is there belongs to another task.
    """
    partial = target.with_name(target.name + ".partial")
    record = partial / _RECORD
    if not record.is_file():
        # A record that was being written when the first call ended leaves its .tmp alone.
        allowed = {f"{_RECORD}.tmp"}
        if partial.exists() and not (
            partial.is_dir() and {path.name for path in partial.iterdir()} <= allowed
        ):
            raise _not_ours(partial)
        partial.mkdir(parents=True, exist_ok=True)
        write_durably(record, json.dumps(task) + "\n")
        return partial, []
    first, *done = _read_whole_lines(record) or [None]
    if first != task:
        raise _not_ours(partial)
    write_durably(record, "".join(json.dumps(line) + "\n" for line in (first, *done)))
    return partial, done


def start_over(target: Path, task: dict[str, Any]) -> Path:
    """Makes `TARGET.partial`, or empties what an interrupted call of the same task left there.

    Raises:
        UserError: what is there belongs to another task.
    """
    partial, _ = start(target, task)
    for path in partial.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _RECORD:
            path.unlink()
    return partial


def _read_whole_lines(record: Path) -> list[dict]:
    """The record up to the first line that is damaged or cut short: its part is done again."""
    found = []
    for line in record.read_bytes().split(b"\n")[:-1]:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(fields, dict):
            break
        found.append(fields)
    return found


def _not_ours(partial: Path) -> UserError:
    return UserError(
        f"{partial} is what another conversion left unfinished, or its source has changed since; "
        "delete it, or choose another folder"
    )


def add(partial: Path, done: dict) -> None:
    """Puts a part on record."""
    with (partial / _RECORD).open("a", encoding="utf-8") as file:
        file.write(json.dumps(done) + "\n")
        file.flush()
        os.fsync(file.fileno())


def finish(partial: Path, target: Path) -> None:
    """Gives the whole folder its name."""
    # In this order a kill in between leaves a whole folder with a record too many.
    partial.rename(target)
    (target / _RECORD).unlink()
