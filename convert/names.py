"""Name tables: which PyTorch tensor is which leaf of ours, and in which layout.

A table is a list of `Entry`. `from_torch` and `to_torch` are inverse to each other and strict: a
missing, unexpected or misshapen tensor is an error, never a log line.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from qvgen_jax.errors import UserError

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
        layout: "same", "linear", "conv2d", "conv3d", "flat" (any shape to a vector) or "patch" (a
            convolution whose stride is its kernel, as a product over `[t*h*w*in, out]`).
        layers: how many layers are stacked on our leading axis; None where nothing is stacked.
        shape: PyTorch's shape, needed to restore "flat" and "patch" leaves.
    """

    path: tuple[str, ...]
    name: str
    layout: str = "same"
    layers: int | None = None
    shape: tuple[int, ...] | None = None


def _import(array: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.layout == "flat":
        return array.reshape(-1)
    if entry.layout == "patch":
        return array.transpose(2, 3, 4, 1, 0).reshape(-1, array.shape[0])
    axes = _AXES[entry.layout]
    return array if axes is None else array.transpose(axes)


def _export(array: np.ndarray, entry: Entry) -> np.ndarray:
    if entry.layout == "flat":
        return array.reshape(entry.shape)
    if entry.layout == "patch":
        out, channels, *window = entry.shape
        return array.reshape(*window, channels, out).transpose(4, 3, 0, 1, 2)
    axes = _AXES[entry.layout]
    return array if axes is None else array.transpose(np.argsort(axes))


def torch_names(table: Iterable[Entry]) -> list[str]:
    """Every PyTorch name the table speaks of."""
    names = []
    for entry in table:
        layers = range(entry.layers) if entry.layers is not None else [None]
        names += [entry.name if i is None else entry.name.format(i=i) for i in layers]
    return names


def check_names(expected: Iterable[str], given: Iterable[str]) -> None:
    """Raises UserError, naming the first few, if tensors are missing or unexpected."""
    expected, given = set(expected), set(given)
    missing, unexpected = sorted(expected - given), sorted(given - expected)
    if missing or unexpected:
        raise UserError(
            f"the checkpoint does not fit its config.json: {len(missing)} tensors missing "
            f"{missing[:4]}, {len(unexpected)} unexpected {unexpected[:4]}; check that the folder "
            "holds the model that its config.json describes"
        )


def from_torch(table: list[Entry], tensors: Mapping[str, np.ndarray]) -> dict:
    """Our nested dict from PyTorch tensors (as numpy arrays).

    Raises:
        UserError: tensors are missing or unexpected.
    """
    check_names(torch_names(table), tensors)
    params: dict = {}
    for entry in table:
        if entry.layers is None:
            leaf = np.ascontiguousarray(_import(tensors[entry.name], entry))
        else:
            layers = range(entry.layers)
            leaf = np.stack([_import(tensors[entry.name.format(i=i)], entry) for i in layers])
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
            tensors[entry.name] = np.ascontiguousarray(_export(leaf, entry))
        else:
            for i in range(entry.layers):
                name = entry.name.format(i=i)
                tensors[name] = np.ascontiguousarray(_export(leaf[i], entry))
    return tensors
