"""Verify: a conversion against what it was made from, tensor by tensor, as a certificate."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from convert import array_tree
from convert.load import find_folder
from convert.progress import write_durably
from convert.safetensors_file import sha256
from convert.tables import table_for
from convert.tensors import Tensors, read_json
from convert.travel import CERTIFICATE, Report, companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json

_BLOCK = 1 << 20


def open_tensors(pipeline: Path) -> Mapping[str, np.ndarray]:
    """The transformer's tensors by PyTorch name, from safetensors or from an import.

    Raises:
        UserError: the folder is damaged, or its transformer is packed.
    """
    folder = pipeline / "transformer"
    if not folder.is_dir():
        raise UserError(
            f"{pipeline} has no transformer/; verify takes two full-precision pipelines, "
            "safetensors or imports: check an import of QVGen's release by exporting it again "
            "with --released"
        )
    fields = read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise UserError(
            f"{pipeline} is packed; verify takes two full-precision pipelines, safetensors or "
            "imports: check an import of QVGen's release by exporting it again with --released"
        )
    if not array_tree.is_array_tree(folder):
        return Tensors(folder)
    array_tree.read_manifest(folder)
    return array_tree.ArrayTensors(folder, table_for(config_from_json(fields)))


def verify(source: str | Path, converted: str | Path, report: Report = silent) -> dict:
    """Compares two pipeline folders and writes the certificate into the second.

    Either may be safetensors or an import. Tensors are read one by one.

    Returns:
        The certificate: `equal`, and for every tensor, layer and other file what was found. Errors
        are `max|a - b|`, and relative to `max|a|` of the source's tensor; None where there is none.

    Raises:
        UserError: one of them is not a whole pipeline folder.
    """
    source, converted = find_folder(source), find_folder(converted)
    if source.resolve() == converted.resolve():
        raise UserError(
            f"{source} and {converted} are the same folder; give the source and its conversion"
        )
    ours, theirs = open_tensors(source), open_tensors(converted)
    tensors = {}
    for name in ours:
        tensors[name] = _compare(name, ours, theirs) if name in theirs else None
        report(len(tensors), len(ours))
    missing = sorted(name for name, found in tensors.items() if found is None)
    unexpected = sorted(set(theirs) - set(ours))
    tensors = {name: found for name, found in tensors.items() if found}
    files = dict(_compare_files(source, converted))
    certificate = {
        "format_version": 1,
        "source": str(source.resolve()),
        "converted": str(converted.resolve()),
        "equal": not missing
        and not unexpected
        and all(found["equal"] for found in tensors.values())
        and set(files.values()) <= {"equal"},
        "counts": {
            "tensors": len(ours),
            "equal": sum(found["equal"] for found in tensors.values()),
            "files": len(files),
        },
        "missing": missing,
        "unexpected": unexpected,
        "layers": _by_layer(tensors),
        "tensors": tensors,
        "files": files,
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


def _compare(
    name: str, ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    one, other = _look(ours[name]), _look(theirs[name])
    same = one == other
    # Only what differs is in memory twice, read once more.
    error, relative = (0.0, 0.0) if same else _largest_error(ours[name], theirs[name])
    return {
        "equal": same,
        **one._asdict(),
        **({} if same else {"converted": other._asdict()}),
        "max_error": error,
        "max_relative_error": relative,
    }


def _largest_error(ours: np.ndarray, theirs: np.ndarray) -> tuple[float | None, float | None]:
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
        }
        for layer, group in layers.items()
    }


def _largest(errors: Iterable[float | None]) -> float | None:
    errors = list(errors)
    return None if None in errors else max(errors)


def _compare_files(source: Path, converted: Path) -> Iterator[tuple[str, str]]:
    """Every other file, and whether it is equal, different, missing or unexpected."""
    ours, theirs = set(companions(source)), set(companions(converted))
    for path in sorted(ours | theirs):
        if path not in theirs:
            yield str(path), "missing"
        elif path not in ours:
            yield str(path), "unexpected"
        else:
            same = _file_sha256(source / path) == _file_sha256(converted / path)
            yield str(path), "equal" if same else "different"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_table(certificate: Mapping[str, Any]) -> str:
    """The certificate for people: one line per layer, then everything that differs."""
    lines = [
        f"{'layer':<24} {'tensors':>8} {'equal':>6} {'bytes':>14} {'error':>9} {'relative':>9}"
    ]
    for layer, found in _in_order(certificate["layers"]):
        lines.append(
            f"{layer:<24} {found['tensors']:>8} {found['equal']:>6} {found['bytes']:>14,} "
            f"{_short(found['max_error']):>9} {_short(found['max_relative_error']):>9}"
        )
    for name, found in certificate["tensors"].items():
        if not found["equal"]:
            lines.append(f"differs: {name}, error {_short(found['max_error'])}")
    lines += [f"{what}: {name}" for what in ("missing", "unexpected") for name in certificate[what]]
    lines += [f"{what}: {path}" for path, what in certificate["files"].items() if what != "equal"]
    counts = certificate["counts"]
    lines.append(
        f"{counts['equal']} of {counts['tensors']} tensors equal to the bit, {counts['files']} "
        f"other files; {'EQUAL' if certificate['equal'] else 'NOT EQUAL'}"
    )
    return "\n".join(lines)


def _short(error: float | None) -> str:
    return "none" if error is None else f"{error:.2g}"


def _in_order(layers: Mapping[str, dict]) -> list[tuple[str, dict]]:
    def key(item: tuple[str, dict]) -> tuple[str, int]:
        stem, _, number = item[0].rpartition(".")
        return (stem, int(number)) if stem else ("", 0)

    return sorted(layers.items(), key=key)
