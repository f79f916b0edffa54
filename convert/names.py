"""Name tables: which PyTorch tensor is which leaf of ours, and in which layout.

A table is a list of `Entry`. `from_torch` and `to_torch` are inverse to each other and strict: a
missing, unexpected or misshapen tensor is an error, never a log line.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from qvgen_jax.errors import UserError
from qvgen_jax.quant.blocks import ranges

# How PyTorch's axes become ours (channels last); the inverse permutation is computed.
_AXES = {
    "same": None,
    "linear": (1, 0),  # [out, in] -> [in, out]
    "conv2d": (2, 3, 1, 0),  # [out, in, h, w] -> [h, w, in, out]
    "conv3d": (2, 3, 4, 1, 0),  # [out, in, t, h, w] -> [t, h, w, in, out]
}


class Entry(NamedTuple):
    """One leaf.

    Attributes:
        path: where it lies in our nested dict.
        name: the PyTorch name; `{i}` stands for the layer index of a stacked leaf.
        layout: "same", "linear", "conv2d", "conv3d", "flat" (any shape to a vector), "patch" (a
            convolution whose stride is its kernel, as a product over `[t*h*w*in, out]`) or "unfold"
            (the same over `[in*h*w, out]`, PyTorch's own order).
        layers: how many layers are stacked on our leading axis; None where nothing is stacked.
        shape: PyTorch's shape, needed to restore "flat", "patch" and "unfold" leaves.
    """

    path: tuple[str, ...]
    name: str
    layout: str = "same"
    layers: int | None = None
    shape: tuple[int, ...] | None = None


def to_ours(array: np.ndarray, entry: Entry) -> np.ndarray:
    """One PyTorch tensor in our layout; a view where the layout allows."""
    if entry.layout == "flat":
        return array.reshape(-1)
    if entry.layout == "patch":
        return array.transpose(2, 3, 4, 1, 0).reshape(-1, array.shape[0])
    if entry.layout == "unfold":
        return array.reshape(array.shape[0], -1).T
    axes = _AXES[entry.layout]
    return array if axes is None else array.transpose(axes)


def to_theirs(array: np.ndarray, entry: Entry) -> np.ndarray:
    """One of our tensors (one layer of a stacked leaf) in PyTorch's layout."""
    if entry.layout == "flat":
        return array.reshape(entry.shape)
    if entry.layout == "patch":
        out, channels, *window = entry.shape
        return array.reshape(*window, channels, out).transpose(4, 3, 0, 1, 2)
    if entry.layout == "unfold":
        return array.T.reshape(entry.shape)
    axes = _AXES[entry.layout]
    return array if axes is None else array.transpose(np.argsort(axes))


def torch_shape(shape: tuple[int, ...], entry: Entry) -> tuple[int, ...]:
    """PyTorch's shape of what is `shape` in our layout (one layer of a stacked leaf)."""
    return to_theirs(np.broadcast_to(np.int8(0), shape), entry).shape


def torch_names(table: Iterable[Entry]) -> list[str]:
    """Every PyTorch name the table speaks of."""
    names = []
    for entry in table:
        layers = range(entry.layers) if entry.layers is not None else [None]
        names += [entry.name if i is None else entry.name.format(i=i) for i in layers]
    return names


def in_ranges(names: Iterable[str]) -> str:
    """All the names in few words: `blocks.{0-3,7}.norm.weight, proj_out.bias`."""
    layers: dict[str, list[int]] = {}
    for name in sorted(names):
        number = re.search(r"(?<=\.)\d+(?=\.)", name)
        pattern = f"{name[: number.start()]}{{}}{name[number.end() :]}" if number else name
        layers.setdefault(pattern, []).extend([int(number.group())] if number else [])
    return ", ".join(
        name.replace("{}", f"{{{ranges(sorted(numbers))}}}" if len(numbers) > 1 else str(*numbers))
        for name, numbers in layers.items()
    )


def check_names(expected: Iterable[str], given: Iterable[str]) -> None:
    """See that every tensor is used once and every target filled once.

    Raises:
        UserError: tensors are missing or unexpected; the message names them all.
    """
    missing, unexpected = set(expected) - set(given), set(given) - set(expected)
    if missing or unexpected:
        raise UserError(
            f"the checkpoint does not fit its config.json: {len(missing)} tensors missing "
            f"[{in_ranges(missing)}], {len(unexpected)} unexpected [{in_ranges(unexpected)}]; "
            "check that the folder holds the model that its config.json describes"
        )


def from_torch(table: list[Entry], tensors: Mapping[str, np.ndarray]) -> dict:
    """Our nested dict from PyTorch tensors (as numpy arrays).

    Raises:
        UserError: tensors are missing or unexpected; the message names them all.
    """
    check_names(torch_names(table), tensors)
    params: dict = {}
    for entry in table:
        if entry.layers is None:
            leaf = np.ascontiguousarray(to_ours(tensors[entry.name], entry))
        else:
            layers = range(entry.layers)
            leaf = np.stack([to_ours(tensors[entry.name.format(i=i)], entry) for i in layers])
        node = params
        for part in entry.path[:-1]:
            node = node.setdefault(part, {})
        node[entry.path[-1]] = leaf
    return params


def to_torch(table: list[Entry], params: Mapping) -> dict[str, np.ndarray]:
    """PyTorch tensors (as numpy arrays) from our nested dict; the inverse of `from_torch`."""
    tensors = {}
    for entry in table:
        node = params
        for part in entry.path:
            node = node[part]
        leaf = np.asarray(node)
        if entry.layers is None:
            tensors[entry.name] = np.ascontiguousarray(to_theirs(leaf, entry))
        else:
            for i in range(entry.layers):
                name = entry.name.format(i=i)
                tensors[name] = np.ascontiguousarray(to_theirs(leaf[i], entry))
    return tensors
