"""Verify: a conversion against what it was made from, tensor by tensor, as a certificate."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from convert import array_tree
from convert.certificate import certify, compare, compare_files
from convert.load import find_folder
from convert.tables import table_for
from convert.tensors import Tensors, read_json
from convert.travel import Report, companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json

_TAKES = (
    "verify takes two full-precision pipelines, safetensors or imports, or a checkpoint of QVGen's "
    "release, as `export --released` writes it too, and the packed pipeline imported from it: "
    "`verify CHECKPOINT PACKED --base BASE`"
)


def is_packed(pipeline: str | Path) -> bool:
    """Whether a pipeline folder's transformer is packed.

    Raises:
        UserError: the folder cannot be found, or its config.json is damaged.
    """
    path = find_folder(pipeline) / "transformer" / "config.json"
    return path.is_file() and bool(read_json(path).get("quantization_config"))


def open_tensors(pipeline: Path) -> Mapping[str, np.ndarray]:
    """The transformer's tensors by PyTorch name, from safetensors or from an import.

    Raises:
        UserError: the folder is damaged, or its transformer is packed.
    """
    folder = pipeline / "transformer"
    if not folder.is_dir():
        raise UserError(f"{pipeline} has no transformer/; {_TAKES}")
    fields = read_json(folder / "config.json")
    if fields.get("quantization_config"):
        raise UserError(f"{pipeline} is packed; {_TAKES}")
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
    theirs, ours = open_tensors(converted), open_tensors(source)
    tensors = {}
    for name in ours:
        tensors[name] = compare(name, ours, theirs) if name in theirs else None
        report(len(tensors), len(ours))
    files = {path: source / path for path in companions(source)}
    unexpected = set(theirs) - set(ours)
    return certify(source, converted, tensors, unexpected, dict(compare_files(files, converted)))
