"""JSON files: read where others wrote them or somebody changed them by hand, written whole."""

import json
import secrets
from pathlib import Path
from typing import Any

from qvgen_jax.errors import UserError

_LARGEST = 100_000_000  # Bytes. The index of the largest models has less than one of these.


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is no JSON, nested deeper than Python follows, or holds a number too long.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: Path, remedy: str) -> Any:
    """What a JSON file says.

    Args:
        path: the file.
        remedy: what to do about a bad one, the end of a sentence.

    Raises:
        UserError: the file is missing, is no JSON, or larger than any that is needed here.
    """
    try:
        if (size := path.stat().st_size) > _LARGEST:
            raise UserError(f"{path} has {size} bytes, expected at most {_LARGEST}; {remedy}")
        return parse_json(path.read_text(encoding="utf-8"))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path} does not read as JSON ({error}); {remedy}") from error


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """`read_json` of a file that holds a JSON object.

    Raises:
        UserError: as `read_json`, or the file holds something else.
    """
    fields = read_json(path, remedy)
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}, expected a JSON object; {remedy}")
    return fields


def write_json(path: Path, content: Any) -> None:
    """Writes a file that is there completely or as it was; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The same of a text; of several that write the file at the same time, the last one's stays."""
    partial = path.with_suffix(f".{secrets.token_hex(4)}.part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
