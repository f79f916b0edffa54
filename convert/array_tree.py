"""Our parameters on disk: zarr arrays in one OCDBT store, which orbax restores.

A transformer's folder holds `config.json`, `arrays.json` (the manifest) and `arrays/`, an orbax
checkpoint (its "checkpoint format": `_METADATA` names the leaves, OCDBT holds each as a zarr v3
array). orbax's own save wants whole leaves in memory; here they are written slice by slice with
tensorstore, and orbax's two small JSON files are written at the end.

Chunks never span layers and are at most 4 MiB, halved along their longest axis: a device that holds
a part of a leaf reads that part. They are stored as they are, with a checksum: compression takes
twice the time and saves 8 % of float32 weights.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from convert.names import Entry, in_ranges, to_theirs, torch_names
from convert.progress import write_durably
from convert.tensors import read_json
from qvgen_jax.errors import UserError
from qvgen_jax.placement import check_cuts

FORMAT_VERSION = 1
MANIFEST = "arrays.json"
ARRAYS = "arrays"
_CHUNK_BYTES = 4 << 20
# One for all: a leaf opened in a context of its own would write files of its own.
_CONTEXT = ts.Context()
_NODE_BYTES = 128 << 10  # Of OCDBT's index: a write replaces the nodes it touches.


def is_array_tree(folder: Path) -> bool:
    """Whether a transformer's folder holds our arrays."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a transformer's folder.

    Raises:
        UserError: it is missing, damaged, or of another version; everything wrong with its
            structure is named at once.
    """
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{folder / MANIFEST} has format_version {manifest.get('format_version')!r}, expected "
            f"{FORMAT_VERSION}; import the model again with this version of qvgen-jax"
        )
    faults = list(_faults(manifest))
    if faults:
        raise UserError(
            f"{folder / MANIFEST} is damaged: {'; '.join(faults)}; import the model again"
        )
    return manifest


def _faults(manifest: dict[str, Any]) -> Iterator[str]:
    """What in a manifest is not what an import writes."""
    for field in ("files", "sha256"):
        if not _is_strings(manifest.get(field)):
            yield f"{field} is not an object of strings"
    index = manifest.get("index")
    if index is not None and not (_is_strings(index) and set(index) == {"name", "text"}):
        yield "index is neither null nor {name, text}"
    leaves = manifest.get("leaves")
    if not isinstance(leaves, dict):
        yield "leaves is not an object"
        return
    wrong = [name for name, leaf in leaves.items() if not _is_leaf(leaf)]
    if wrong:
        yield f"{in_ranges(wrong)} without a shape of whole numbers and a dtype"


def _is_strings(fields: Any) -> bool:
    return isinstance(fields, dict) and all(isinstance(value, str) for value in fields.values())


def _is_leaf(leaf: Any) -> bool:
    if not isinstance(leaf, dict) or not isinstance(leaf.get("dtype"), str):
        return False
    shape = leaf.get("shape")
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def chunk_shape(shape: tuple[int, ...], itemsize: int, stacked: bool) -> tuple[int, ...]:
    """The largest chunk of at most 4 MiB that halving the longest axis gives; one layer deep."""
    chunk = [1, *shape[1:]] if stacked else list(shape)
    while int(np.prod(chunk)) * itemsize > _CHUNK_BYTES:
        longest = int(np.argmax(chunk))
        chunk[longest] = -(-chunk[longest] // 2)
    return tuple(chunk)


def create_leaf(
    root: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    stacked: bool,
    transaction: ts.Transaction,
) -> ts.TensorStore:
    """Opens a leaf for writing within the transaction; made if it is not there yet."""
    chunk = chunk_shape(shape, dtype.itemsize, stacked)
    metadata = {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "crc32c"},
        ],
    }
    return _open({**_spec(root, name), "metadata": metadata}, create=True, transaction=transaction)


def open_leaf(root: Path, name: str) -> ts.TensorStore:
    """Opens a leaf for reading.

    Raises:
        UserError: it is not there or is damaged.
    """
    return _open(_spec(root, name), read=True)


def _spec(root: Path, name: str) -> dict[str, Any]:
    store = {
        "driver": "ocdbt",
        "base": f"file://{root.resolve()}/",
        "path": f"{name}/",
        "config": {"max_decoded_node_bytes": _NODE_BYTES},
    }
    return {"driver": "zarr3", "kvstore": store}


def _open(spec: dict[str, Any], **mode: Any) -> ts.TensorStore:
    try:
        return ts.open(spec, context=_CONTEXT, open=True, **mode).result()
    except ValueError as error:
        raise _damage(Path(spec["kvstore"]["base"].removeprefix("file://")), error) from error


def _damage(root: Path, error: Exception) -> UserError:
    return UserError(
        f"{root} does not read: its files are incomplete or damaged ({str(error).splitlines()[0]})"
        "; import the model again"
    )


def write_metadata(root: Path, paths: list[tuple[str, ...]]) -> None:
    """Makes the store an orbax checkpoint; call when every leaf is written."""
    # orbax gives back numpy arrays where no sharding is asked for, on any number of devices.
    value = {"value_type": "np.ndarray", "skip_deserialize": False}
    tree = {
        str(path): {
            "key_metadata": [{"key": key, "key_type": 2} for key in path],  # 2: of a dict
            "value_metadata": value,
        }
        for path in paths
    }
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": False,
        "custom_metadata": None,
    }
    handler = ocp.StandardCheckpointHandler
    step = {"item_handlers": f"{handler.__module__}.{handler.__qualname__}", "metrics": {}}
    write_durably(root / "_METADATA", json.dumps(metadata))
    write_durably(root / "_CHECKPOINT_METADATA", json.dumps(step))


class ArrayTensors(Mapping[str, np.ndarray]):
    """An array tree as PyTorch's tensors by name, each read when it is asked for.

    Args:
        folder: the transformer's.
        table: its name table.
    """

    def __init__(self, folder: Path, table: list[Entry]):
        self._root = folder / ARRAYS
        self._leaves: dict[str, ts.TensorStore] = {}
        self._places = {
            name: (entry, None if entry.layers is None else layer)
            for entry in table
            for layer, name in enumerate(torch_names([entry]))
        }

    def __getitem__(self, name: str) -> np.ndarray:
        entry, layer = self._places[name]
        leaf = ".".join(entry.path)
        if leaf not in self._leaves:
            self._leaves[leaf] = open_leaf(self._root, leaf)
        store = self._leaves[leaf]
        try:
            array = (store if layer is None else store[layer]).read().result()
        except ValueError as error:
            raise _damage(self._root, error) from error
        return np.ascontiguousarray(to_theirs(array, entry))

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def restore_params(folder: Path, like: Any) -> Any:
    """The parameters of an imported transformer, each leaf straight to where it shall live.

    Args:
        folder: the transformer's.
        like: the model's tree of `jax.ShapeDtypeStruct`: with a sharding, the leaf becomes a
            `jax.Array` of which every host reads its own slices; without, a numpy array. The dtype
            is `like`'s, whatever the source stored.

    Raises:
        UserError: the folder is damaged, of another version, or of another model; or a sharding
            does not divide its leaf.
    """
    check_cuts(like, jax.tree.map(lambda leaf: leaf.sharding, like))
    stored = read_manifest(folder)["leaves"]
    expected = {
        ".".join(part.key for part in path): list(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    shapes = {name: leaf["shape"] for name, leaf in stored.items()}
    strange = [
        f"{name} is {shapes.get(name, 'missing')}, expected {expected.get(name, 'nothing')}"
        for name in sorted(set(expected) | set(shapes))
        if expected.get(name) != shapes.get(name)
    ]
    if strange:
        raise UserError(
            f"{folder} does not hold the model that its config.json describes: "
            f"{'; '.join(strange)}; import it again"
        )
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True))
    arguments = ocp.args.PyTreeRestore(item=like, restore_args=jax.tree.map(_restore_args, like))
    try:
        return checkpointer.restore((folder / ARRAYS).resolve(), args=arguments)
    except Exception as error:
        # Where a sharding is given, orbax wraps what tensorstore says in a bare Exception.
        said = error.__cause__ if type(error) is Exception else error
        if not isinstance(said, ValueError | OSError):
            raise
        raise _damage(folder / ARRAYS, said) from error


def _restore_args(leaf: jax.ShapeDtypeStruct) -> ocp.RestoreArgs:
    if leaf.sharding is None:
        return ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf.dtype)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
