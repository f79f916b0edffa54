"""Which tile the Hopper kernel takes for a product, and the arithmetic behind the choice.

Per multiprocessor and cycle: 4096 int8 multiply-accumulates (1979 TOPS / 132 / 1.83 GHz / 2), and
of the order of 40 bytes out of the L2 cache, the one figure here that is an assumption. Codes are
bytes, so a step over `inner` of them takes `rows * columns * inner / 4096` cycles to multiply and
`(rows + columns / cluster) * inner / 40` to fetch:

| tile | multiply, cycles per inner | fetch, clusters of 2 | fetch, alone |
|---|---|---|---|
| 128 x 256 | 8 | 6.4 | 9.6 |
| 256 x 128 | 8 | 8 | 9.6 |
| 128 x 192 | 6 | 5.6 | 8 |
| 128 x 128 | 4 | 4.8 | 6.4 |
| 128 x 64 | 2 | 4 | 4.8 |

128 x 256 is the largest whose int32 accumulators (128 registers a thread) leave room for anything
else, and the best for large products. The others win where it leaves many multiprocessors idle in
the last round or many columns empty: 1920 columns are 15 tiles of 128 and 7.5 of 256.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp

from kernels.operands import Product

WARPGROUPS = 2
ROWS_PER_WGMMA = 64
# A row of the pieces in which results leave: wide enough for whole sectors, and small enough that
# two pieces for each warpgroup fit beside four stages.
SLAB_BYTES = 64
MULTIPROCESSORS = 132
# What a block may ask for: 228 KiB less the KiB that the driver keeps.
SHARED_BYTES = 227 * 1024
# Barriers, alignment of every buffer to 1 KiB, the compiler's scratch for reductions.
_RESERVED_BYTES = 6 * 1024
_VECTORS = (3, 4)
_STORE_SLOTS = 2
_MOST_STAGES = 8
_MACS_PER_CYCLE = 4096
_FETCH_BYTES_PER_CYCLE = 40
# Converting, correcting, scaling and storing an element takes about 8 of 128 lanes a cycle.
_WRITE_ELEMENTS_PER_CYCLE = 16
_SHAPES = ((128, 256), (256, 128), (128, 192), (128, 128), (128, 64))
_MANY_ROWS = 32_760


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        rows, columns: of the result that a block computes at a time; half the rows for each of the
            two multiplying warpgroups, so a multiple of 128; columns a multiple of 32.
        inner: codes in a stage, at one byte; 128 fill the widest swizzle.
        stages: that are in flight.
        cluster: 2 blocks, one above the other, share the fetch of their columns; 1 does not.
        store_slots: pieces of the result that may be on their way out, for each warpgroup.
    """

    rows: int
    columns: int
    inner: int = 128
    stages: int = 4
    cluster: int = 2
    store_slots: int = _STORE_SLOTS

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block takes, without what the compiler adds."""
        ring = self.stages * (self.rows + self.columns) * self.inner
        slabs = WARPGROUPS * self.store_slots * ROWS_PER_WGMMA * SLAB_BYTES
        vectors = 4 * (_VECTORS[0] * self.rows + _VECTORS[1] * self.columns)
        return ring + slabs + vectors

    @property
    def accumulators(self) -> int:
        """int32 registers of a thread that hold its part of the result."""
        return self.rows * self.columns // (WARPGROUPS * 128)

    def blocks(self, rows: int, columns: int) -> int:
        """Tiles in a result, in whole clusters."""
        clusters = math.ceil(rows / (self.rows * self.cluster))
        return clusters * self.cluster * math.ceil(columns / self.columns)

    def cycles(self, rows: int, columns: int, inner: int) -> float:
        """Estimated length of the product on a whole H100 or H200."""
        rounds = math.ceil(self.blocks(rows, columns) / MULTIPROCESSORS)
        inner = math.ceil(inner / self.inner) * self.inner
        multiply = self.rows * self.columns * inner / _MACS_PER_CYCLE
        fetch = (self.rows + self.columns / self.cluster) * inner / _FETCH_BYTES_PER_CYCLE
        write = self.rows * self.columns / _WRITE_ELEMENTS_PER_CYCLE
        return rounds * (max(multiply, fetch) + write)


def _with_stages(rows: int, columns: int, cluster: int) -> Tile:
    """The tile with as many stages as fit."""
    without = Tile(rows, columns, stages=0, cluster=cluster)
    free = SHARED_BYTES - _RESERVED_BYTES - without.shared_bytes
    stages = min(free // ((rows + columns) * without.inner), _MOST_STAGES)
    return Tile(rows, columns, stages=stages, cluster=cluster)


def tiles(product: Product) -> Tile:
    """The tile with the shortest estimate; the first of the table above where two are equal."""
    rows = product.rows or _MANY_ROWS
    candidates = [
        _with_stages(height, width, 1 if rows <= height else 2) for height, width in _SHAPES
    ]
    return min(candidates, key=lambda tile: tile.cycles(rows, product.columns, product.inner))


def slab_columns(out_dtype: jnp.dtype) -> int:
    """Columns of a piece of the result on its way out."""
    return SLAB_BYTES // jnp.dtype(out_dtype).itemsize
