"""Export: an imported pipeline folder becomes the safetensors files that it was made from."""

import hashlib
import os
from pathlib import Path

import numpy as np

from convert import array_tree, progress
from convert.array_tree import ArrayTensors
from convert.load import find_folder
from convert.names import check_names, in_ranges
from convert.safetensors_file import TensorInfo, parse_header, sha256
from convert.tables import table_for
from convert.tensors import INDEX, is_plain_name, read_json
from convert.travel import Report, check_target, copy_companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json


def export_safetensors(source: str | Path, target: str | Path, report: Report = silent) -> int:
    """Writes the transformer's files byte for byte as they were imported, and copies the rest.

    The folder appears only when it is complete. Until then it grows in `TARGET.partial`; the same
    call after an interruption keeps the files that are whole. At any time one tensor is in memory.

    Args:
        source: a folder made by `import_pipeline`.
        target: the folder to make, in diffusers' layout.
        report: called with the transformer's bytes written so far, and all of them.

    Returns:
        The transformer's bytes.

    Raises:
        UserError: the source is no import or is damaged; or the target exists.
    """
    source, target = find_folder(source), Path(target)
    folder = source / "transformer"
    if not array_tree.is_array_tree(folder):
        config = folder / "config.json"
        if config.is_file() and read_json(config).get("quantization_config"):
            raise UserError(
                f"{source} holds a packed transformer, which `qvgen_jax.load` reads as it is; to "
                "write it under the names of QVGen's release, add --released"
            )
        raise UserError(
            f"{source} is no folder made by `python -m convert import`: it has no "
            f"transformer/{array_tree.MANIFEST}; safetensors folders need no export"
        )
    check_target(source, target)
    manifest = array_tree.read_manifest(folder)
    files = _planned_files(folder, manifest)
    table = table_for(config_from_json(read_json(folder / "config.json")))
    tensors = ArrayTensors(folder, table)
    check_names(tensors, [info.name for infos in files.values() for info in infos])

    partial, records = progress.start(target, _task(folder))
    copy_companions(source, partial)
    total = sum(info.nbytes for infos in files.values() for info in infos)
    done = 0
    for name, infos in files.items():
        path, text = partial / "transformer" / name, manifest["files"][name]
        if {"file": name} not in records:
            _write_file(path, text, infos, tensors, manifest["sha256"])
            progress.add(partial, {"file": name})
        done += sum(info.nbytes for info in infos)
        report(done, total)
    if manifest["index"]:
        index = partial / "transformer" / manifest["index"]["name"]
        progress.write_durably(index, manifest["index"]["text"])
    progress.finish(partial, target)
    return total


def _task(folder: Path) -> dict[str, str]:
    """What must be unchanged for an interrupted export to go on."""
    manifest = (folder / array_tree.MANIFEST).read_bytes()
    return {"task": "export", "manifest": hashlib.sha256(manifest).hexdigest()}


def _planned_files(folder: Path, manifest: dict) -> dict[str, tuple[TensorInfo, ...]]:
    """The tensors of each file to write; the manifest may have been changed by anybody."""
    names, index = list(manifest["files"]), manifest["index"]
    strange = [name for name in names if not is_plain_name(name)]
    if index and not is_plain_name(index["name"].replace(INDEX, ".safetensors")):
        strange.append(index["name"])
    if strange:
        raise UserError(
            f"{folder / array_tree.MANIFEST} names files outside its folder: {', '.join(strange)}; "
            "import the model again"
        )
    return {name: parse_header(folder / name, text) for name, text in manifest["files"].items()}


def _write_file(
    path: Path,
    header: str,
    infos: tuple[TensorInfo, ...],
    tensors: ArrayTensors,
    sha256_of: dict[str, str],
) -> None:
    raw, changed = header.encode(), []
    partial = path.with_name(path.name + ".tmp")
    with partial.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for info in infos:
            array = tensors[info.name]
            if sha256(array) != sha256_of.get(info.name):
                changed.append(info.name)
            file.write(array.reshape(-1).view(np.uint8))
        file.flush()
        os.fsync(file.fileno())
    if changed:
        raise UserError(
            f"{in_ranges(changed)} are not what was imported: the arrays were changed or damaged; "
            "import the model again"
        )
    partial.replace(path)
