"""What an import will write, settled from config and headers before anything is written."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from convert.names import Entry, check_names, in_ranges, torch_names, torch_shape
from convert.safetensors_file import TensorInfo
from convert.tables import table_for
from qvgen_jax.errors import UserError
from qvgen_jax.models import abstract_params

_KINDS = ("F32", "BF16", "F16")
_BATCH_BYTES = 64 << 20


class Leaf(NamedTuple):
    """One leaf of our tree and the tensors that fill it.

    Attributes:
        entry: its row of the name table.
        shape: ours, with the layers in front where they are stacked.
        dtype: the source's.
    """

    entry: Entry
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def name(self) -> str:
        return ".".join(self.entry.path)


class Part(NamedTuple):
    """One source tensor and its place: a whole leaf, or one layer of a stacked one."""

    name: str
    leaf: Leaf
    layer: int | None


def leaf_shapes(config: Any) -> dict[tuple[str, ...], tuple[int, ...]]:
    """The shape of every leaf of the transformer by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(config))
    return {tuple(part.key for part in path): leaf.shape for path, leaf in leaves}


def plan_leaves(config: Any, infos: Mapping[str, TensorInfo]) -> list[Leaf]:
    """Pairs every source tensor with its place.

    Args:
        config: of the transformer.
        infos: from the source's headers.

    Raises:
        UserError: a tensor is missing, unexpected, or of a wrong shape or type, or the layers of
            one leaf differ in type; every such tensor is named.
    """
    table, shapes = table_for(config), leaf_shapes(config)
    check_names(torch_names(table), infos)
    faults, leaves = {}, []
    for entry in table:
        shape, names = shapes[entry.path], torch_names([entry])
        expected = torch_shape(shape if entry.layers is None else shape[1:], entry)
        for name in names:
            fault = _fault(infos[name], expected, infos[names[0]].kind)
            if fault:
                faults.setdefault(fault, []).append(name)
        leaves.append(Leaf(entry, shape, infos[names[0]].dtype))
    if faults:
        each = "; ".join(f"{in_ranges(names)} {fault}" for fault, names in faults.items())
        raise UserError(
            f"the checkpoint does not fit its config.json: {each}; check that the folder holds the "
            "model that its config.json describes"
        )
    return leaves


def _fault(info: TensorInfo, expected: tuple[int, ...], kind: str) -> str | None:
    if info.shape != expected:
        return f"is {list(info.shape)}, expected {list(expected)}"
    if info.kind not in _KINDS:
        return f"is {info.kind}, expected one of {', '.join(_KINDS)}"
    if info.kind != kind:
        return f"is {info.kind}, its first layer {kind}: they cannot share a leaf"
    return None


def parts(leaves: list[Leaf]) -> list[Part]:
    """Every tensor, leaf by leaf and layer by layer."""
    return [
        Part(name, leaf, None if leaf.entry.layers is None else layer)
        for leaf in leaves
        for layer, name in enumerate(torch_names([leaf.entry]))
    ]


def batches(work: list[Part], infos: Mapping[str, TensorInfo]) -> Iterator[list[Part]]:
    """The parts cut into writes: one large tensor, or small ones up to 64 MiB."""
    batch, room = [], _BATCH_BYTES
    for part in work:
        room -= infos[part.name].nbytes
        if batch and room < 0:
            yield batch
            batch, room = [], _BATCH_BYTES - infos[part.name].nbytes
        batch.append(part)
    if batch:
        yield batch
