"""One safetensors file: its header checked to the last byte, its tensors read by byte range.

The format (github.com/huggingface/safetensors, README): eight bytes with the header's length, the
header as JSON, then the tensors side by side without gaps. Reading by range keeps a file of many
gigabytes out of this process's memory, which mapping it does not.
"""

import hashlib
import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qvgen_jax.errors import UserError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
# A number is NaN or infinite when every bit of its exponent is set.
_EXPONENTS = {
    "F64": (np.uint64, 0x7FF0000000000000),
    "F32": (np.uint32, 0x7F800000),
    "F16": (np.uint16, 0x7C00),
    "BF16": (np.uint16, 0x7F80),
}
_MAX_HEADER = 100_000_000  # The reference implementation's limit.
_HALVES = re.compile("[\ud800-\udfff]")
_LARGEST = 2**63 - 1  # Of a size or an offset: what files and numpy can hold.
_MOST_AXES = 64  # numpy's.
_SHOWN = 20  # Faults of one file.
_BLOCK = 1 << 20


class TensorInfo(NamedTuple):
    """Where one tensor lies; `start` counts from the file's first byte."""

    file: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.kind]


class Header(NamedTuple):
    """A file's header, as text (to write it again) and as tensors in the order of their bytes."""

    text: str
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path) -> Header:
    """Reads and checks the header; of the tensors no byte is read.

    Raises:
        UserError: the file is missing, cut short, or its header is wrong; what is wrong with it
            is named at once.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _MAX_HEADER):
                raise _refusal(path, f"{size} bytes do not hold a header of {length} bytes")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path} does not read ({error.strerror}); fetch it again") from error
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise _refusal(path, f"its header is not UTF-8 ({error})") from error
    return Header(text, parse_header(path, text, size))


def parse_header(path: Path, text: str, size: int | None = None) -> tuple[TensorInfo, ...]:
    """The tensors that a header describes, in the order of their bytes.

    Args:
        path: the file it is of; need not exist.
        text: the header.
        size: the file's, in bytes; None if it is to be written yet.

    Raises:
        UserError: the header is wrong, or does not fit the file.
    """
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _refusal(path, f"its header is no JSON object with unique names ({error})") from error
    if not isinstance(fields, dict):
        raise _refusal(path, f"its header is a {type(fields).__name__}, expected an object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, metadata.values())):
        raise _refusal(path, "its __metadata__ is not an object of strings")
    start = 8 + len(text.encode())
    faults, tensors = [], []
    for name, entry in fields.items():
        fault = _fault(entry)
        if fault:
            faults.append(f"{_short(name)}: {fault}")
            continue
        begin, end = entry["data_offsets"]
        shape, kind = tuple(entry["shape"]), entry["dtype"]
        tensors.append(TensorInfo(path, name, kind, shape, start + begin, end - begin))
    tensors.sort(key=lambda info: (info.start, info.nbytes))
    if not faults:
        faults = _misplaced(tensors, start, size)
    if faults:
        raise _refusal(path, first_few(faults))
    return tuple(tensors)


def read_tensor(info: TensorInfo) -> np.ndarray:
    """The tensor, in memory of its own.

    Raises:
        UserError: the file is shorter than its header says, or the tensor holds NaN or infinity.
    """
    try:
        raw = np.fromfile(info.file, np.uint8, info.nbytes, offset=info.start)
    except OSError as error:
        raise UserError(f"{info.file} does not read ({error}); fetch it again") from error
    if raw.size != info.nbytes:
        raise _refusal(info.file, f"it ends inside {info.name}")
    bad = _count_not_finite(raw, info.kind)
    if bad:
        raise UserError(
            f"{info.file}: {info.name} holds {bad} values that are NaN or infinite; such a model "
            "computes nothing: fetch the file again, or take an earlier checkpoint"
        )
    return raw.view(info.dtype).reshape(info.shape)


def sha256(array: np.ndarray) -> str:
    """Of a contiguous array's bytes, in hexadecimal: the tensor's as a file holds it."""
    return hashlib.sha256(array.reshape(-1).view(np.uint8)).hexdigest()


def _count_not_finite(raw: np.ndarray, kind: str) -> int:
    if kind not in _EXPONENTS:
        return 0
    word, exponent = _EXPONENTS[kind]
    words, mask = raw.view(word), word(exponent)
    blocks = (words[i : i + _BLOCK] for i in range(0, words.size, _BLOCK))
    return sum(int(np.count_nonzero((block & mask) == mask)) for block in blocks)


def _fault(entry: Any) -> str | None:
    """What is wrong with one tensor's entry, taken by itself."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "its entry is not {dtype, shape, data_offsets}"
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        return f"unknown type {reprlib.repr(kind)}"
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        shown = f"shape {reprlib.repr(shape)} or data_offsets {reprlib.repr(offsets)}"
        return f"{shown} are not whole numbers from 0 to 2^63 - 1"
    # Without the zeros: numpy multiplies what is left of an empty shape, and must not overflow.
    if len(shape) > _MOST_AXES or math.prod(filter(None, shape)) > _LARGEST // 8:
        return f"shape {reprlib.repr(shape)} is more than memory has room for"
    stated, needed = offsets[1] - offsets[0], math.prod(shape) * DTYPES[kind].itemsize
    if stated != needed:
        return f"{kind} {shape} takes {needed} bytes, its data_offsets span {stated}"
    return None


def _is_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= _LARGEST for value in values
    )


def _misplaced(tensors: list[TensorInfo], start: int, size: int | None) -> list[str]:
    """Tensors must lie side by side from the first byte after the header to the file's last."""
    faults, end = [], start
    for info in tensors:
        if info.start != end:
            what = "overlaps what lies before it" if info.start < end else "leaves a gap before it"
            faults.append(f"{_short(info.name)}: {what} (byte {info.start}, expected {end})")
        end = max(end, info.start + info.nbytes)
    if size is not None and end != size:
        faults.append(f"header and tensors take {end} bytes, the file has {size}")
    return faults


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can say: JSON's escapes can name half a character."""
    return isinstance(value, str) and (value.isascii() or not _HALVES.search(value))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = Counter(name for name, _ in pairs)
    if strange := [name for name in names if not _is_text(name)]:
        raise ValueError(f"{strange[0]!r} is half a character")
    if len(names) != len(pairs):
        twice = sorted(_short(name) for name, count in names.items() if count > 1)
        raise ValueError(f"{first_few(twice, ', ')} given twice")
    return dict(pairs)


def first_few(faults: Sequence[str], separator: str = "; ") -> str:
    """The faults as one text, of a damaged file's many thousand only the first."""
    more = len(faults) - _SHOWN
    return separator.join(faults[:_SHOWN]) + (f"{separator}and {more} more" if more > 0 else "")


def _short(name: str) -> str:
    return name if len(name) <= 200 else f"{name[:200]}..."


def _refusal(path: Path, fault: str) -> UserError:
    return UserError(f"{path} does not read as a safetensors file: {fault}; fetch it again")
