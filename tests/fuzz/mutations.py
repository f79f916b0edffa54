"""What is done to a good file, or to what a good JSON file holds, so that it is none any more."""

import copy
import math
import random
from typing import Any

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
STRANGE = (
    None,
    True,
    False,
    -1,
    0,
    1,
    3,
    1.5,
    -0.0,
    1e308,
    math.nan,
    math.inf,
    2**31,
    2**63,
    10**30,
    -(2**63),
    10**4000,
    "",
    "x",
    "../../../etc/passwd",
    "/etc/passwd",
    "a\0b",
    "\ud800",
    "a" * 300,
    [],
    {},
    [None],
    [[]],
    [0],
    [-1, 10**12],
    {"": None},
)


def mutated_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four changes: bits, bytes, edge values of integers, pieces gone, doubled or new."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        place = rng.randrange(len(out) + 1)
        length = min(rng.choice((1, 2, 4, 8, 16, 64, 256)), len(out) - place)
        kind = rng.randrange(7)
        if kind == 0 and place < len(out):
            out[place] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            size = rng.choice((1, 2, 4, 8))
            edge = rng.choice(_EDGES) % 256**size
            out[place : place + size] = edge.to_bytes(size, rng.choice(("big", "little")))
        elif kind == 3:
            del out[place : place + length]
        elif kind == 4:
            out[place:place] = out[place : place + length]
        elif kind == 5:
            out[place:place] = rng.randbytes(length)
        elif kind == 6 and rng.random() < 0.3:
            del out[place:]
    return bytes(out)


def mutated_json(value: Any, rng: random.Random) -> Any:
    """A copy with one to three of its nodes replaced, removed, doubled or renamed."""
    out = {"": copy.deepcopy(value)}
    for _ in range(rng.choice((1, 1, 2, 3))):
        holder, key = rng.choice(list(_nodes(out)))
        kind = rng.randrange(5)
        if kind <= 1 or holder is out:
            holder[key] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == 2:
            del holder[key]
        elif isinstance(holder, dict):
            name = rng.choice((f"{key}_", "", "..", rng.choice(list(holder))))
            holder[name] = holder.pop(key) if kind == 3 else copy.deepcopy(holder[key])
        else:
            holder.append(copy.deepcopy(holder[key]))
    return out[""]


def _nodes(holder: Any):
    pairs = list(holder.items() if isinstance(holder, dict) else enumerate(holder))
    for key, value in pairs:
        yield holder, key
        if isinstance(value, dict | list):
            yield from _nodes(value)
