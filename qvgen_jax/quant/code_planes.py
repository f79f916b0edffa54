"""Codes of 2 to 8 bits in bytes: planes of 4, 2 and 1 bits, see `pack_codes`."""

import numpy as np

from qvgen_jax.errors import UserError

# Codes are cut into planes whose widths divide a byte; the first plane holds the lowest bits.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def packed_bytes(in_features: int, bits: int) -> int:
    """Bytes of one output channel's codes."""
    return sum(-(-in_features * width // 8) for width in _PLANES[bits])


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes `[out, in]` to uint8 `[out, packed_bytes(in, bits)]`.

    4 bits: two codes a byte, the even input in the low nibble. 3 bits: a plane of the two low bits,
    four codes a byte, then a plane of the high bit, eight codes a byte; within a byte the first
    input is lowest. An odd end is filled with zero bits.
    """
    codes, planes, shift = np.ascontiguousarray(codes, np.uint8), [], 0
    for width in _PLANES[bits]:
        per_byte = 8 // width
        plane = (codes >> shift) & (2**width - 1)
        plane = np.pad(plane, ((0, 0), (0, -codes.shape[1] % per_byte)))
        plane = plane.reshape(codes.shape[0], -1, per_byte)
        places = (width * np.arange(per_byte)).astype(np.uint8)
        planes.append(np.bitwise_or.reduce(plane << places, axis=-1))
        shift += width
    return np.concatenate(planes, axis=1)


def unpack_codes(packed: np.ndarray, bits: int, in_features: int) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 `[out, in]`.

    Raises:
        UserError: the bytes per channel do not fit `in_features` and `bits`.
    """
    expected = packed_bytes(in_features, bits)
    if packed.dtype != np.uint8 or packed.ndim != 2 or packed.shape[1] != expected:
        raise UserError(
            f"codes are {packed.dtype} {list(packed.shape)}, expected uint8 [out, {expected}] for "
            f"{in_features} inputs of {bits} bits; the file and its config.json do not belong "
            "together, export again"
        )
    codes = np.zeros((packed.shape[0], in_features), np.uint8)
    start = shift = 0
    for width in _PLANES[bits]:
        per_byte = 8 // width
        stop = start + -(-in_features // per_byte)
        places = (width * np.arange(per_byte)).astype(np.uint8)
        plane = (packed[:, start:stop, None] >> places) & np.uint8(2**width - 1)
        codes |= plane.reshape(packed.shape[0], -1)[:, :in_features] << np.uint8(shift)
        start, shift = stop, shift + width
    return codes
