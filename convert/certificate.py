"""The certificate of a conversion: what was found of every tensor, layer and file; its table."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert.progress import write_durably
from convert.safetensors_file import sha256
from convert.travel import CERTIFICATE, companions

_BLOCK = 1 << 20


def certify(
    source: Path,
    converted: Path,
    tensors: Mapping[str, dict[str, Any] | None],
    unexpected: Iterable[str],
    files: Mapping[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Writes the certificate into `converted` and returns it.

    Args:
        source: what `converted` was made from.
        converted: the folder that was checked.
        tensors: every tensor it must hold, and what `compare` found; None where it is missing.
        unexpected: tensors it must not hold.
        files: every other file, from `compare_files`.
        more: of one kind of check only, to be written as it is.
    """
    unexpected = sorted(unexpected)
    found = {name: entry for name, entry in tensors.items() if entry}
    equal = sum(entry["equal"] for entry in found.values())
    certificate = {
        "format_version": 1,
        "source": str(source.resolve()),
        "converted": str(converted.resolve()),
        **more,
        "equal": equal == len(tensors) and not unexpected and set(files.values()) <= {"equal"},
        "counts": {
            "tensors": len(tensors),
            "equal": equal,
            "files": len(files),
            **_sums_of_codes(found.values()),
        },
        "missing": sorted(set(tensors) - set(found)),
        "unexpected": unexpected,
        "layers": _by_layer(found),
        "tensors": found,
        "files": dict(files),
    }
    write_durably(converted / CERTIFICATE, json.dumps(certificate, indent=1) + "\n")
    return certificate


class _Look(NamedTuple):
    """What is kept of a tensor that has been read."""

    shape: list[int]
    dtype: str
    bytes: int
    sha256: str


def _look(array: np.ndarray) -> _Look:
    return _Look(list(array.shape), array.dtype.name, array.nbytes, sha256(array))


def compare(
    name: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """What is found of one tensor, which is read from either as often as it is needed."""
    one, other = _look(ours[name]), _look(theirs[name])
    same = one == other
    # Only what differs is in memory twice, read once more.
    error, relative = (0.0, 0.0) if same else largest_error(ours[name], theirs[name])
    return {
        "equal": same,
        **one._asdict(),
        **({} if same else {"converted": other._asdict()}),
        "max_error": error,
        "max_relative_error": relative,
    }


def largest_error(ours: np.ndarray, theirs: np.ndarray) -> tuple[float | None, float | None]:
    """`max|a - b|`, and over `max|a|`; None where the shapes differ or a value is not finite."""
    if ours.shape != theirs.shape:
        return None, None
    error = largest = 0.0
    a, b = ours.reshape(-1), theirs.reshape(-1)
    for start in range(0, a.size, _BLOCK):
        one = a[start : start + _BLOCK].astype(np.float64)
        other = b[start : start + _BLOCK].astype(np.float64)
        if not (np.isfinite(one).all() and np.isfinite(other).all()):
            return None, None  # NaN has no distance, and JSON no word for infinity.
        error = max(error, float(np.abs(one - other).max()))
        largest = max(largest, float(np.abs(one).max()))
    return error, error / largest if largest else error


def _by_layer(tensors: Mapping[str, dict]) -> dict[str, dict]:
    layers: dict[str, list[dict]] = {}
    for name, found in tensors.items():
        match = re.match(r"(.*?\.\d+)\.", name)
        layers.setdefault(match.group(1) if match else "outside the blocks", []).append(found)
    return {
        layer: {
            "tensors": len(group),
            "equal": sum(found["equal"] for found in group),
            "bytes": sum(found["bytes"] for found in group),
            "max_error": _largest(found["max_error"] for found in group),
            "max_relative_error": _largest(found["max_relative_error"] for found in group),
            **_sums_of_codes(group),
        }
        for layer, group in layers.items()
    }


def _sums_of_codes(entries: Iterable[dict]) -> dict[str, Any]:
    """Of the packed linears among the tensors; nothing where there is none."""
    linears = [found for found in entries if "codes" in found]
    if not linears:
        return {}
    sums = {key: sum(found[key] for found in linears) for key in ("codes", "codes_that_differ")}
    return sums | {
        key: _largest(found[key] for found in linears)
        for key in ("max_weight_error", "max_relative_weight_error")
    }


def _largest(errors: Iterable[float | None]) -> float | None:
    errors = list(errors)
    return None if None in errors else max(errors)


def compare_files(ours: Mapping[Path, Path], converted: Path) -> Iterator[tuple[str, str]]:
    """Every other file, and whether it is equal, different, missing or unexpected.

    Args:
        ours: what must travel along, relative to the pipeline folder, and where each lies.
        converted: the folder that was checked.
    """
    theirs = set(companions(converted))
    for path in sorted(set(ours) | theirs):
        if path not in theirs:
            yield str(path), "missing"
        elif path not in ours:
            yield str(path), "unexpected"
        else:
            same = _file_sha256(ours[path]) == _file_sha256(converted / path)
            yield str(path), "equal" if same else "different"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_table(certificate: Mapping[str, Any]) -> str:
    """The certificate for people: one line per layer, then everything that differs."""
    counts, packed = certificate["counts"], "codes" in certificate["counts"]
    heading = (
        f"{'layer':<24} {'tensors':>8} {'equal':>6} {'bytes':>14} {'error':>9} {'relative':>9}"
    )
    lines = [heading + (f" {'codes off':>9} {'weights':>9}" if packed else "")]
    for layer, found in _in_order(certificate["layers"]):
        line = (
            f"{layer:<24} {found['tensors']:>8} {found['equal']:>6} {found['bytes']:>14,} "
            f"{_short(found['max_error']):>9} {_short(found['max_relative_error']):>9}"
        )
        if "codes" in found:
            line += f" {found['codes_that_differ']:>9} {_short(found['max_weight_error']):>9}"
        lines.append(line)
    lines += _findings(certificate)
    if packed:
        lines.append(
            f"{counts['codes_that_differ']:,} of {counts['codes']:,} codes differ; packed weights "
            f"are {_short(counts['max_weight_error'])} from the release's at most, "
            f"{_short(counts['max_relative_weight_error'])} of their layer's largest"
        )
    rounded = sum(
        found["equal"] and "tolerance" in found for found in certificate["tensors"].values()
    )
    within = f", {rounded} within float32's rounding" if rounded else ""
    lines.append(
        f"{counts['equal'] - rounded} of {counts['tensors']} tensors equal to the bit{within}, "
        f"{counts['files']} other files; {'EQUAL' if certificate['equal'] else 'NOT EQUAL'}"
    )
    return "\n".join(lines)


def _findings(certificate: Mapping[str, Any]) -> Iterator[str]:
    """Everything that is not as it must be, a line each."""
    for name, found in certificate["tensors"].items():
        if not found["equal"]:
            codes = "{codes_that_differ:,} of {codes:,} codes, " if "codes" in found else ""
            yield f"differs: {name}, {codes.format(**found)}error {_short(found['max_error'])}"
    for what in ("missing", "unexpected"):
        yield from (f"{what}: {name}" for name in certificate[what])
    yield from (f"{what}: {path}" for path, what in certificate["files"].items() if what != "equal")
    yield from (f"transformer/config.json: {fault}" for fault in certificate.get("config", ()))


def _short(error: float | None) -> str:
    return "none" if error is None else f"{error:.2g}"


def _in_order(layers: Mapping[str, dict]) -> list[tuple[str, dict]]:
    def key(item: tuple[str, dict]) -> tuple[str, int]:
        stem, _, number = item[0].rpartition(".")
        return (stem, int(number)) if stem else ("", 0)

    return sorted(layers.items(), key=key)
