"""Blocks that differ in bits: their names, and the runs of them that lie together in memory.

`blocks.attn1.to_q` is that linear of every block, `blocks.7.attn1.to_q` the one of block 7. In
training bits are data, an array over a stack's layers. In a packed network they decide the type and
the layout of arrays: blocks whose codes lie alike form a *segment*, a stack of its own.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from qvgen_jax.quant.config import QuantConfig

_PREFIX = "blocks."
MOST_SEGMENTS = 8
"""Of a packed network: each is compiled by itself."""


def split_block(name: str) -> tuple[int | None, str]:
    """Block and stacked name of a linear: `blocks.7.ffn.up` is (7, `blocks.ffn.up`).

    The block is None where the name is of every block, or of a linear outside them.
    """
    match = re.fullmatch(r"blocks\.(0|[1-9][0-9]{0,3})\.(.+)", name)
    return (int(match[1]), _PREFIX + match[2]) if match else (None, name)


def in_block(name: str, block: int | None) -> str:
    """The name of one block's linear, from the stacked name; as it is if the block is None."""
    return name if block is None else f"{_PREFIX}{block}.{name.removeprefix(_PREFIX)}"


def is_stacked(name: str) -> bool:
    """Whether every block has a linear of this name."""
    return name.startswith(_PREFIX)


def levels_of(config: "QuantConfig", name: str, blocks: Iterable[int] | None) -> np.ndarray:
    """2^bits - 1 of a layer's weights and activations: float32 `[2]`, or `[2, blocks]`."""
    bits = [config.bits_of(name, block) for block in ((None,) if blocks is None else blocks)]
    most = np.float32(2) ** np.array(bits, np.float32).T - 1
    return most[:, 0] if blocks is None else most


def bits_label(weights: int, activations: int, others: Collection) -> str:
    """What a network is called: `W4A4`, and `W4A4 and others` where some layers have other bits."""
    return f"W{weights}A{activations}" + (" and others" if others else "")


class Segment(NamedTuple):
    """Neighbouring blocks that lie in memory as one stack.

    Attributes:
        start, stop: the first block, and the one past the last.
        config: what they are built with: of every layer the widest of their bits, whose container
            holds them all.
    """

    start: int
    stop: int
    config: "QuantConfig"


def segments_of(
    config: "QuantConfig", names: Iterable[str], layers: int, most: int = MOST_SEGMENTS
) -> tuple[Segment, ...]:
    """The fewest segments in which no block's codes lie wider than they need.

    Codes of up to 4 bits lie in half a byte, others in a whole one; activations likewise, in the
    unit that multiplies them. Where that would take more than `most` segments, neighbours are
    joined so that the fewest layers lie wider than they need. The numbers are the same.

    Args:
        config: of the whole network.
        names: its quantized layers.
        layers: blocks.
    """
    if not config.by_block:
        return (Segment(0, layers, config),)
    stacked = [name for name in names if is_stacked(name)]
    widths = [[config.bits_of(name, block) for name in stacked] for block in range(layers)]
    wide = [[bits > 4 for pair in row for bits in pair] for row in widths]
    starts = [i for i in range(layers) if i == 0 or wide[i] != wide[i - 1]]
    bounds = _joined([*starts, layers], wide, most)
    return tuple(
        Segment(start, stop, config.with_widest(stacked, range(start, stop)))
        for start, stop in pairwise(bounds)
    )


def _joined(bounds: Sequence[int], wide: Sequence[Sequence[bool]], most: int) -> list[int]:
    """Of the bounds of runs at most `most` + 1, so that the least lies wider than it needs."""
    runs = len(bounds) - 1
    if runs <= most:
        return list(bounds)

    # wasted[i, j]: layers that lie wider than they need if runs i to j - 1 are one segment.
    sums = np.cumsum(np.array(wide, np.int64), axis=0)
    before = np.concatenate([np.zeros_like(sums[:1]), sums])[list(bounds)]
    wasted = np.full((runs + 1, runs + 1), np.inf)
    for i in range(runs):
        counts, rows = before[i + 1 :] - before[i], np.array(bounds[i + 1 :]) - bounds[i]
        wasted[i, i + 1 :] = (rows[:, None] * (counts > 0) - counts).sum(1)
    # best[j]: the least of the runs before j, in one segment more each time.
    best, last = wasted[0], []
    for _ in range(most - 1):
        either = best[:, None] + wasted
        last.append(either.argmin(0))
        best = either.min(0)
    chosen = [runs]
    for begins in reversed(last):
        chosen.append(int(begins[chosen[-1]]))
    return [bounds[i] for i in (0, *reversed(chosen))]


class Place(NamedTuple):
    """Where some layers of a stack are in a packed network's parameters.

    Attributes:
        path: dotted, of the node.
        blocks: they are these of the stack; None of a linear outside the blocks.
        bits: of weights and activations, those of the container.
    """

    path: str
    blocks: range | None
    bits: tuple[int, int]


def places_of(name: str, segments: Sequence[Segment]) -> list[Place]:
    """All places of a linear, or of another parameter, of which only `path` and `blocks` mean
    something then."""
    if not is_stacked(name):
        return [Place(name, None, segments[0].config.bits_of(name))]
    return [
        Place(
            f"{_PREFIX}{key}{name.removeprefix(_PREFIX)}",
            range(segment.start, segment.stop),
            segment.config.bits_of(name),
        )
        for segment, key in zip(segments, _keys(segments), strict=True)
    ]


def _keys(segments: Sequence[Segment]) -> list[str]:
    if len(segments) == 1:
        return [""]
    return [f"{segment_key(segment.start)}." for segment in segments]


def segment_key(start: int) -> str:
    """The name of a segment in the parameters, where there are several."""
    return f"from_{start}"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in few words: `0-3,7`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
