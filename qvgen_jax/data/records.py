"""The bytes of one encoded clip: a msgpack map whose arrays are raw little-endian bytes."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import msgpack
import numpy as np

_DTYPES = {
    "float32": np.dtype("<f4"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
DAMAGE = (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException)
"""What `unpack` may raise of bytes that `pack` did not make."""


def pack(record: Mapping[str, Any]) -> bytes:
    """Bytes of a map of strings and arrays (float32 or bfloat16).

    Raises:
        ValueError: an array is of another type.
    """
    return msgpack.packb({key: _pack_value(value) for key, value in record.items()})


def unpack(data: bytes) -> dict[str, Any]:
    """The map that `pack` took; its arrays are read-only views of `data`."""
    return {key: _unpack_value(value) for key, value in msgpack.unpackb(data).items()}


def _pack_value(value: Any) -> Any:
    if isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.dtype.name not in _DTYPES:
        raise ValueError(f"a record holds {', '.join(_DTYPES)} arrays, got {array.dtype}")
    return {
        "dtype": array.dtype.name,
        "shape": array.shape,
        "data": np.ascontiguousarray(array, _DTYPES[array.dtype.name]).tobytes(),
    }


def _unpack_value(value: Any) -> Any:
    if isinstance(value, str):
        return value
    return np.frombuffer(value["data"], _DTYPES[value["dtype"]]).reshape(value["shape"])
