"""The Hopper kernel itself, in Pallas Mosaic GPU.

In the form of CUTLASS's cooperative warp-specialised GEMM. A block owns one multiprocessor for the
whole call and walks over tiles of the result. One warpgroup only starts TMA copies into a ring of
stages; two only multiply and write. The ring runs on from tile to tile, so that the next is fetched
while one is written. Two blocks, one above the other, form a cluster and fetch their columns
together, each one half for both.
"""

import functools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels.hopper_tiles import (
    MULTIPROCESSORS,
    ROWS_PER_WGMMA,
    SLAB_BYTES,
    WARPGROUPS,
    Tile,
    slab_columns,
)

# A warpgroup that only starts copies needs few registers; the accumulators get the rest (CUTLASS).
_FETCH_REGISTERS, _MULTIPLY_REGISTERS = 40, 232
# Tiles side by side before going down: their columns stay in the L2 cache meanwhile.
_SNAKE_WIDTH = 8


class Plan(NamedTuple):
    """What is known of a product while its kernel is traced.

    Attributes:
        tile: how it is cut.
        inner: K, before padding.
        row_vectors, column_vectors: how many there are.
        asymmetric: the weights have zero points; `row_sum` and they come last but for the bias.
        biased: the last column vector is a bias.
    """

    tile: Tile
    inner: int
    row_vectors: int
    column_vectors: int
    asymmetric: bool
    biased: bool

    @property
    def steps(self) -> int:
        return pl.cdiv(self.inner, self.tile.inner)


def build(plan: Plan, out: jax.ShapeDtypeStruct, interpret: bool):
    """The kernel for one shape: a function of A, W, the vectors of rows and those of columns.

    A is int8 `[rows, inner]`, W int8 `[columns, inner]`, with rows in eights, inner in 128s and
    columns in slabs. The result `[rows, columns]` has as many rows as out says. Vectors are
    float32. Those of rows: scale, zero point, and the sum of the codes if asymmetric; those of
    columns: scale, sum of the codes, the zero point if asymmetric, the bias if biased.

    Raises:
        NotImplementedError: interpret on jax before 0.11.
    """
    tile = plan.tile
    # Two clusters are enough to be interpreted, and leave several tiles to each.
    available = 2 * tile.cluster if interpret else _multiprocessors()
    clusters = min(available, tile.blocks(*out.shape)) // tile.cluster
    return plgpu.kernel(
        functools.partial(_block, plan),
        out_type=out,
        scratch_types=_shared_memory(plan, out.dtype),
        grid=(clusters,),
        grid_names=("clusters",),
        cluster=(tile.cluster,),
        cluster_names=("cluster",),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        interpret=_interpreter() if interpret else None,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # Safe, as no warpgroup reads shared memory that it also writes; 20 barriers, not 50.
            unsafe_no_auto_barriers=True,
        ),
    )


def _interpreter():
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise NotImplementedError(
            f"jax {jax.__version__} cannot interpret Mosaic GPU kernels; use jax >= 0.11"
        )
    return plgpu.InterpretGPUParams(detect_races=True)


def _multiprocessors() -> int:
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else MULTIPROCESSORS


def _shared_memory(plan: Plan, out_dtype: jnp.dtype) -> dict[str, Any]:
    """Buffers and barriers of a block, by name."""
    tile = plan.tile
    pieces, slab = tile.rows // ROWS_PER_WGMMA, slab_columns(out_dtype)
    released = {"num_arrivals": WARPGROUPS, "num_barriers": tile.stages}
    return {
        "a_ring": _swizzled((tile.stages, tile.rows, tile.inner), jnp.int8, tile.inner),
        "b_ring": _swizzled((tile.stages, tile.columns, tile.inner), jnp.int8, tile.inner),
        "row_vectors": plgpu.SMEM((plan.row_vectors, pieces, ROWS_PER_WGMMA), jnp.float32),
        "column_vectors": plgpu.SMEM((plan.column_vectors, tile.columns), jnp.float32),
        # One piece of a slab's width, not several of 8 rows: the same bytes in the same places, but
        # TMA then takes a result whose rows are no multiple of 8.
        "slabs": plgpu.SMEM(
            (WARPGROUPS, tile.store_slots, ROWS_PER_WGMMA, slab),
            out_dtype,
            transforms=(plgpu.TilingTransform((slab,)), plgpu.SwizzleTransform(SLAB_BYTES)),
        ),
        "filled": plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
        # A shared fetch overwrites a stage in both blocks: all four warpgroups must have left it.
        "emptied": plgpu.ClusterBarrier(collective_axes=("cluster",), **released)
        if tile.cluster > 1
        else plgpu.Barrier(**released),
        "vectors_filled": plgpu.Barrier(
            num_arrivals=plan.row_vectors * pieces + plan.column_vectors
        ),
        "vectors_emptied": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


def _swizzled(shape: tuple[int, ...], dtype: jnp.dtype, width: int):
    """Shared memory whose rows of `width` bytes lie as wgmma and TMA want them."""
    tiling = plgpu.TilingTransform((8, width // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(width)))


def _block(plan: Plan, *refs, **shared) -> None:
    """What a block does: its last warpgroup fetches, the others multiply."""
    *inputs, out = refs
    memory = SimpleNamespace(**shared)
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup == WARPGROUPS)
    def _():
        plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
        _fetch(plan, inputs, memory, out.shape)

    @pl.when(warpgroup < WARPGROUPS)
    def _():
        plgpu.set_max_registers(_MULTIPLY_REGISTERS, action="increase")
        _multiply(plan, out, memory, warpgroup)


def _each_tile(tile: Tile, shape: tuple[int, int]):
    """Decorates what is done for each tile that falls to this block: `(count, row, column)`."""
    grid = (pl.cdiv(shape[0], tile.rows * tile.cluster), pl.cdiv(shape[1], tile.columns))

    def decorate(body):
        @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="clusters")
        def _(loop):
            down, right = plgpu.planar_snake(loop.index[0], grid, 1, _SNAKE_WIDTH)
            row = (down * tile.cluster + lax.axis_index("cluster")) * tile.rows
            body(loop.local_index, row, right * tile.columns)

    return decorate


def _fetch(plan: Plan, inputs, memory, shape: tuple[int, int]) -> None:
    """Starts every copy into shared memory. Beyond the ends of an array TMA delivers zeros."""
    tile, steps = plan.tile, plan.steps
    a, b, *vectors = inputs

    @_each_tile(tile, shape)
    def _(count, row, column):
        @pl.loop(0, steps)
        def _(step):
            number = count * steps + step
            slot = lax.rem(number, tile.stages)

            @pl.when(number >= tile.stages)
            def _():
                plgpu.barrier_wait(memory.emptied.at[slot])

            inner = pl.ds(step * tile.inner, tile.inner)
            plgpu.copy_gmem_to_smem(
                a.at[pl.ds(row, tile.rows), inner], memory.a_ring.at[slot], memory.filled.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                b.at[pl.ds(column, tile.columns), inner],
                memory.b_ring.at[slot],
                memory.filled.at[slot],
                collective_axes="cluster" if tile.cluster > 1 else None,
            )

        # Last, so that waiting for the tile before to be written delays no stage of this one.
        @pl.when(count > 0)
        def _():
            plgpu.barrier_wait(memory.vectors_emptied)

        for i, vector in enumerate(vectors[: plan.row_vectors]):
            for piece in range(tile.rows // ROWS_PER_WGMMA):
                source = vector.at[pl.ds(row + piece * ROWS_PER_WGMMA, ROWS_PER_WGMMA)]
                plgpu.copy_gmem_to_smem(
                    source, memory.row_vectors.at[i, piece], memory.vectors_filled
                )
        for i, vector in enumerate(vectors[plan.row_vectors :]):
            source = vector.at[pl.ds(column, tile.columns)]
            plgpu.copy_gmem_to_smem(source, memory.column_vectors.at[i], memory.vectors_filled)

    # The neighbour signals to this block's barriers too: leaving first would pull them away.
    clusters, here = lax.axis_size("clusters"), lax.axis_index("clusters")
    total = steps * lax.div(tile.blocks(*shape) // tile.cluster - here + clusters - 1, clusters)

    @pl.loop(jnp.maximum(total - tile.stages, 0), total)
    def _(number):
        plgpu.barrier_wait(memory.emptied.at[lax.rem(number, tile.stages)])

    plgpu.barrier_wait(memory.vectors_emptied)


def _multiply(plan: Plan, out, memory, warpgroup: jax.Array) -> None:
    """Half the rows of every tile: the product of the codes, then the result."""
    tile, steps = plan.tile, plan.steps
    height = tile.rows // WARPGROUPS

    @_each_tile(tile, out.shape)
    def _(count, row, column):
        def one_tile(accumulator):
            def start(number):
                slot = lax.rem(number, tile.stages)
                plgpu.barrier_wait(memory.filled.at[slot])
                plgpu.wgmma(
                    accumulator,
                    memory.a_ring.at[slot, pl.ds(warpgroup * height, height)],
                    memory.b_ring.at[slot].T,
                )

            def give_back(number):
                plgpu.barrier_arrive(memory.emptied.at[lax.rem(number, tile.stages)])

            first = count * steps
            start(first)

            # A stage is given back once the next is under way, so that the unit never waits.
            @pl.loop(first + 1, first + steps)
            def _(number):
                start(number)
                plgpu.wgmma_wait(1)
                give_back(number - 1)

            sums = accumulator[...]
            give_back(first + steps - 1)
            plgpu.barrier_wait(memory.vectors_filled)
            _write(plan, sums, out, memory, warpgroup, row + warpgroup * height, column)
            plgpu.barrier_arrive(memory.vectors_emptied)

        pl.run_scoped(one_tile, plgpu.ACC((height, tile.columns), jnp.int32))

    plgpu.wait_smem_to_gmem(0)


def _write(plan: Plan, sums, out, memory, warpgroup, row, column) -> None:
    """Writes what a warpgroup's sums of products, int32 `[height, columns]`, amount to.

    A few columns at a time: the vectors of all would not fit into registers.
    """
    tile, slab = plan.tile, slab_columns(out.dtype)
    pieces = sums.shape[0] // ROWS_PER_WGMMA
    # The slabs of the tile before left long ago; their turn starts anew.
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    parts = [(p, left) for p in range(pieces) for left in range(0, tile.columns, slab)]
    for number, (piece, left) in enumerate(parts):
        top = piece * ROWS_PER_WGMMA
        part = sums[top : top + ROWS_PER_WGMMA, left : left + slab].astype(jnp.float32)
        of_rows = [
            memory.row_vectors[i, warpgroup * pieces + piece] for i in range(plan.row_vectors)
        ]
        of_columns = [
            memory.column_vectors[i, pl.ds(left, slab)] for i in range(plan.column_vectors)
        ]
        y = _result(plan, part, of_rows, of_columns)
        slot = memory.slabs.at[warpgroup, number % tile.store_slots]
        plgpu.wait_smem_to_gmem(tile.store_slots - 1, wait_read_only=True)
        slot[...] = y.astype(out.dtype)
        plgpu.commit_smem()
        # Beyond the ends of the array TMA writes nothing.
        target = out.at[pl.ds(row + top, ROWS_PER_WGMMA), pl.ds(column + left, slab)]
        plgpu.copy_smem_to_gmem(slot, target)


def _result(plan: Plan, sums, of_rows, of_columns) -> jax.Array:
    """`sa sw (sums - za (sum(W) - K zw) - zw sum(A)) + bias`, all float32."""

    def down(x):
        return lax.broadcast_in_dim(x, sums.shape, (0,))

    def right(x):
        return lax.broadcast_in_dim(x, sums.shape, (1,))

    scale, zero_point, *row_sum = of_rows
    weight_scale, code_sum, *rest = of_columns
    if plan.asymmetric:
        code_sum = code_sum - plan.inner * rest[0]
    centered = sums - down(zero_point) * right(code_sum)
    if plan.asymmetric:
        centered = centered - down(row_sum[0]) * right(rest[0])
    y = centered * down(scale) * right(weight_scale)
    return y + right(rest[-1]) if plan.biased else y
