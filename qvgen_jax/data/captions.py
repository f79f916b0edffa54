"""Which videos there are and what each shows, in the three ways people write that down."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import NamedTuple

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import parse_json
from qvgen_jax.request import prompt_fault

_FILE_KEYS = ("file", "video", "file_name", "path")
_CAPTION_KEYS = ("caption", "prompt", "text")
_EXPECTED = (
    'expected captions.jsonl (one {"file": ..., "caption": ...} per line), captions.csv (with '
    "columns file and caption), or videos.txt beside captions.txt or prompts.txt (one per line)"
)


class CaptionedFile(NamedTuple):
    """A video by its name relative to the folder, and its caption."""

    file: str
    caption: str


def folder_of(source: str | Path) -> Path:
    """Where the videos of a source lie: the folder that it is, or that its captions file is in."""
    source = Path(source)
    return source if source.is_dir() else source.parent


def read_captions(source: str | Path) -> list[CaptionedFile]:
    """Every video that a captions file lists, in that file's order.

    Args:
        source: a folder with its captions file, or such a file itself, .jsonl or .csv.

    Raises:
        UserError: no folder, no captions file, or one that is empty or malformed, names a file
            outside the folder, or holds a caption that is no text; it names the line. A video that
            is listed but missing is not checked here.
    """
    source = Path(source)
    folder = folder_of(source)
    if source.is_file():
        read = {".jsonl": _read_jsonl, ".csv": _read_csv}.get(source.suffix)
        if read is None:
            raise UserError(f"{source} is no list of videos: {_EXPECTED}")
        path, found = source, read(source)
    elif not source.is_dir():
        raise UserError(
            f"data folder {source} does not exist; give the folder of the videos, or a .jsonl or "
            ".csv file that lists them"
        )
    elif (folder / "captions.jsonl").is_file():
        path, found = folder / "captions.jsonl", _read_jsonl(folder / "captions.jsonl")
    elif (folder / "captions.csv").is_file():
        path, found = folder / "captions.csv", _read_csv(folder / "captions.csv")
    elif (folder / "videos.txt").is_file():
        path, found = folder / "videos.txt", _read_two_lists(folder)
    else:
        raise UserError(f"{folder} holds no captions file: {_EXPECTED}")
    if not found:
        raise UserError(f"{path} lists no videos: {_EXPECTED}")
    return found


def _read_jsonl(path: Path) -> list[CaptionedFile]:
    found = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}): mend it") from error
        found.append(_row(row, path, number))
    return found


def _read_csv(path: Path) -> list[CaptionedFile]:
    rows = csv.DictReader(io.StringIO("\n".join(_lines(path)), newline=""))
    try:
        return [_row(row, path, rows.line_num) for row in rows]
    except csv.Error as error:
        raise UserError(
            f"{path}, line {rows.line_num} is not CSV ({error}): close its quotes, shorten it"
        ) from error


def _read_two_lists(folder: Path) -> list[CaptionedFile]:
    texts = [folder / name for name in ("captions.txt", "prompts.txt")]
    text = next((path for path in texts if path.is_file()), None)
    if text is None:
        raise UserError(f"{folder} has videos.txt but no captions beside it: {_EXPECTED}")
    files = [line.strip() for line in _lines(folder / "videos.txt") if line.strip()]
    captions = [line.strip() for line in _lines(text) if line.strip()]
    if len(files) != len(captions):
        raise UserError(
            f"{folder / 'videos.txt'} lists {len(files)} videos and {text.name} "
            f"{len(captions)} captions: both need one line per video"
        )
    pairs = zip(files, captions, strict=True)
    return [_checked(*pair, folder / "videos.txt", i) for i, pair in enumerate(pairs, start=1)]


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} does not read ({error.strerror}): mend it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error
    # Only \n: JSON strings may hold the other characters that str.splitlines breaks at.
    return text.split("\n")


def _row(row: Mapping, path: Path, number: int) -> CaptionedFile:
    values = []
    for keys in (_FILE_KEYS, _CAPTION_KEYS):
        value = next((row[key] for key in keys if key in row), None) if _is_map(row) else None
        if not isinstance(value, str):
            raise UserError(f"{path}, line {number} has no {keys[0]!r}: {_EXPECTED}")
        values.append(value.strip())
    return _checked(*values, path, number)


def _checked(file: str, caption: str, path: Path, number: int) -> CaptionedFile:
    """A pair that a captions file may hold: the one inside its folder, the other text."""
    name = PurePath(file)
    outside = name.is_absolute() or name.anchor or ".." in name.parts
    if outside or not file or "\0" in file or prompt_fault(file):
        raise UserError(
            f"{path}, line {number} names {file[:200]!r}, expected the name of a file inside the "
            "folder: put the video there, or give the folder that holds it"
        )
    if fault := prompt_fault(caption):
        raise UserError(f"{path}, line {number} has a caption that {fault}")
    return CaptionedFile(file, caption)


def _is_map(row: object) -> bool:
    return isinstance(row, Mapping)
