"""A transformer's blocks as stacked layers: one stack, or several where blocks lie differently."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from qvgen_jax.layer_scan import layer_scan
from qvgen_jax.quant.blocks import segment_key

Segments = Sequence[tuple[int, Callable]]
"""Of neighbouring blocks, how many, and the factory of their linears."""


class SegmentedBlocks(nnx.Module):
    """Stacks of neighbouring blocks, one after the other: attributes `from_0`, `from_12`, ..."""

    def __init__(self, stacks: Sequence[nnx.Module], lengths: Sequence[int]):
        self.starts = tuple(sum(lengths[:i]) for i in range(len(lengths)))
        for start, stack in zip(self.starts, stacks, strict=True):
            setattr(self, segment_key(start), stack)

    def stacks(self) -> list[nnx.Module]:
        """In the order of the blocks."""
        return [getattr(self, segment_key(start)) for start in self.starts]


def build_blocks(
    make_block: Callable[..., nnx.Module], keys: jax.Array, dense: Callable, segments: Segments = ()
) -> nnx.Module:
    """All blocks of a transformer.

    Args:
        make_block: `(key, dense=factory)` to a block.
        keys: one for each.
        dense: factory of the linears, unless there are segments.
        segments: of several stacks; their lengths add up to the blocks.

    Returns:
        A block whose arrays have a leading axis, or `SegmentedBlocks` of such.
    """
    if len(segments) < 2:
        return jax.vmap(partial(make_block, dense=segments[0][1] if segments else dense))(keys)
    lengths = [count for count, _ in segments]
    stacks, start = [], 0
    for count, own in segments:
        stacks.append(jax.vmap(partial(make_block, dense=own))(keys[start : start + count]))
        start += count
    return SegmentedBlocks(stacks, lengths)


def scan_blocks(body: Callable, x: Any, blocks: nnx.Module) -> Any:
    """`x` through all blocks: `layer_scan` of every stack; `body` as there, without outputs."""
    stacks = blocks.stacks() if isinstance(blocks, SegmentedBlocks) else [blocks]
    for stack in stacks:
        x, _ = layer_scan(body, x, stack)
    return x
