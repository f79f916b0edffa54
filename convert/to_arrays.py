"""Import: a pipeline folder whose transformer is safetensors becomes one of sharded arrays."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from convert import array_tree, progress
from convert.load import check_index, find_folder
from convert.names import to_ours
from convert.plan import Part, batches, parts, plan_leaves
from convert.safetensors_file import sha256
from convert.tensors import Tensors, read_json
from convert.travel import Report, check_companions, check_target, copy_companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json


class Imported(NamedTuple):
    """What an import did: tensors and bytes of the transformer, those this call converted."""

    tensors: int
    nbytes: int
    converted: int


def import_pipeline(source: str | Path, target: str | Path, report: Report = silent) -> Imported:
    """Converts the transformer and copies everything else.

    The folder appears only when it is complete. Until then it grows in `TARGET.partial`; the same
    call after an interruption continues there. Values and types are kept: `export_safetensors`
    gives the source's files back. At any time two source tensors are in memory.

    Args:
        source: a folder in diffusers' layout, or the name of one on the Hugging Face hub.
        target: the folder to make.
        report: called with the transformer's bytes written so far, and all of them.

    Raises:
        UserError: the source is damaged, holds NaN or is of an unknown model; or the target exists.
    """
    source, target = find_folder(source), Path(target)
    check_target(source, target)
    check_index(source)
    tensors, fields = _open_source(source / "transformer")
    leaves = plan_leaves(config_from_json(fields), tensors.infos)
    check_companions(source)

    partial, records = progress.start(target, _task(tensors))
    folder = partial / "transformer"
    (folder / array_tree.ARRAYS).mkdir(parents=True, exist_ok=True)
    copy_companions(source, partial)
    digests = {
        name: digest
        for record in records
        for name, digest in record.items()
        if name in tensors and isinstance(digest, str)
    }
    before, total = len(digests), sum(info.nbytes for info in tensors.infos.values())
    work = [part for part in parts(leaves) if part.name not in digests]
    for record in _write(work, tensors, folder / array_tree.ARRAYS):
        digests |= record
        progress.add(partial, record)
        report(sum(tensors.infos[name].nbytes for name in digests), total)
    array_tree.write_metadata(folder / array_tree.ARRAYS, [leaf.entry.path for leaf in leaves])
    manifest = {
        "format_version": array_tree.FORMAT_VERSION,
        "leaves": {x.name: {"shape": list(x.shape), "dtype": x.dtype.name} for x in leaves},
        "sha256": digests,
        "files": {name: header.text for name, header in tensors.headers.items()},
        "index": None,
    }
    if tensors.index:
        text = tensors.index.read_bytes().decode()
        manifest["index"] = {"name": tensors.index.name, "text": text}
    progress.write_durably(folder / array_tree.MANIFEST, json.dumps(manifest, indent=1))
    progress.finish(partial, target)
    return Imported(len(tensors), total, len(tensors) - before)


def _open_source(folder: Path) -> tuple[Tensors, dict[str, Any]]:
    fields = read_json(folder / "config.json")
    if array_tree.is_array_tree(folder):
        raise UserError(f"{folder.parent} is imported already; `load` and the trainer read it")
    if fields.get("quantization_config"):
        raise UserError(
            f"{folder.parent} holds a packed transformer, which `qvgen_jax.load` reads as it is; "
            "import is for full precision"
        )
    return Tensors(folder), fields


def _task(tensors: Tensors) -> dict[str, Any]:
    """What must be unchanged for an interrupted import to go on."""
    files = {info.file for info in tensors.infos.values()}
    stamps = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    headers = "".join(header.text for _, header in sorted(tensors.headers.items()))
    return {
        "task": "import",
        "format_version": array_tree.FORMAT_VERSION,
        "files": dict(sorted(stamps.items())),
        "headers": hashlib.sha256(headers.encode()).hexdigest(),
    }


def _write(work: list[Part], tensors: Tensors, root: Path) -> Iterator[dict[str, str]]:
    """Writes the parts; yields checksums by name whenever some are safe on disk.

    While one batch is being written, the next is read.
    """
    digests: dict[str, str] = {}
    commit: ts.Future | None = None
    for batch in batches(work, tensors.infos):
        arrays = [tensors[part.name] for part in batch]
        ahead = {part.name: sha256(array) for part, array in zip(batch, arrays, strict=True)}
        if commit:
            _wait(root, commit)
            yield digests
        digests, commit = ahead, _start(root, batch, arrays)
        del arrays  # The write has its own copy; the next read needs the room.
    if commit:
        _wait(root, commit)
        yield digests


def _start(root: Path, batch: list[Part], arrays: list[np.ndarray]) -> ts.Future:
    """Starts a write that will be there whole or not at all."""
    transaction, stores = ts.Transaction(), {}
    for (_, leaf, layer), array in zip(batch, arrays, strict=True):
        if leaf.name not in stores:
            stores[leaf.name] = array_tree.create_leaf(
                root, leaf.name, leaf.shape, leaf.dtype, layer is not None, transaction
            )
        store = stores[leaf.name] if layer is None else stores[leaf.name][layer]
        store.write(to_ours(array, leaf.entry)).result()
    return transaction.commit_async()


def _wait(root: Path, commit: ts.Future) -> None:
    try:
        commit.result()
    except ValueError as error:
        raise UserError(
            f"{root} cannot be written ({str(error).splitlines()[0]}); free space there and run "
            "the same command again: it goes on"
        ) from error
