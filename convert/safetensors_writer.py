"""One safetensors file written tensor by tensor, so that it never lies in memory as a whole."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from convert.safetensors_file import DTYPES
from convert.travel import Report, silent

_KINDS = {dtype: kind for kind, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """What a tensor will be: its type and shape."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_stream(
    path: Path,
    specs: Mapping[str, Spec],
    arrays: Iterable[tuple[str, np.ndarray]],
    progress: Report = silent,
) -> int:
    """Writes the file, marked as PyTorch's as transformers demands, and returns its bytes.

    Args:
        path: the file; what is there is replaced.
        specs: every tensor; the header is written from them first.
        arrays: the same tensors in any order, each used and forgotten.
        progress: told after every tensor.

    Raises:
        ValueError: `arrays` does not keep what `specs` promised.
    """
    header, offsets, end = {"__metadata__": {"format": "pt"}}, {}, 0
    # The widest types first: readers that map the file want every tensor aligned.
    for name, spec in sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        offsets[name], start = end, end
        end += spec.nbytes
        header[name] = {
            "dtype": _KINDS[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    done = 0
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for name, array in arrays:
            spec, start = specs[name], offsets.pop(name)
            if (array.dtype, array.shape) != (spec.dtype, spec.shape):
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected {spec}")
            file.seek(8 + len(raw) + start)
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            done += spec.nbytes
            progress(done, end)
        if offsets:
            raise ValueError(f"{sorted(offsets)} were promised and never came")
        file.flush()
        os.fsync(file.fileno())
    return 8 + len(raw) + end
