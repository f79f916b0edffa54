"""How much of a product a TPU core holds in VMEM at a time."""

from typing import NamedTuple

import jax.numpy as jnp

from kernels.operands import Product

LANES = 128
STRIP = 64
"""Rows of tokens at a time in the prologue; a tile of int4 in VMEM has 64 of them."""

VMEM = {name: mib * 2**20 for name, mib in (("v5e", 128), ("v5p", 64), ("v6e", 128), ("tpu7x", 64))}
"""Bytes of a core's vector memory."""

# From large to small: the first that fits is taken.
_CAPS = (
    *((1024, 1536), (1024, 1024), (512, 1024), (512, 512), (512, 256)),
    *((256, 512), (256, 256), (128, 256), (64, 128)),
)
# What a block more costs, in rows or columns: some hundred cycles of every step of the grid.
_STEP = 32
# Products in the unrolled body of the inner loop: more hides the end of one slice behind the start
# of the next, and takes longer to compile.
_BODY = 1024 * 5120 * 512


class Tile(NamedTuple):
    """One step of the grid.

    Attributes:
        rows, columns: of the output's block; the inner axis is never split.
        slice: columns in one pass of the loop inside the kernel; divides `columns`.
    """

    rows: int
    columns: int
    slice: int


def tiles(
    product: Product,
    chip: str,
    dtype: jnp.dtype,
    x_dtype: jnp.dtype | None = None,
) -> Tile:
    """The largest tile that fits, of those that waste least at the product's ends.

    Args:
        product: unknown rows count as many.
        chip: its name; one that is not a TPU, as in interpret mode, counts as v5e.
        dtype: what the codes are multiplied in.
        x_dtype: of tokens that are quantized in the kernel; None where they come as codes.

    Raises:
        NotImplementedError: rows so long that not even the smallest tile fits.
    """
    budget = VMEM.get(chip, VMEM["v5e"]) * 3 // 4
    # The unit is 128 or 256 columns wide.
    width = 2 * LANES if chip in ("v6e", "tpu7x") else LANES
    for rows, columns in _CAPS:
        rows = _even(product.rows or rows, rows, STRIP)
        columns = _even(product.columns, columns, min(width, columns))
        tile = Tile(rows, columns, _slice(rows, product.inner, columns, width))
        if occupied(tile, product, dtype, x_dtype) <= budget:
            return tile
    raise NotImplementedError(
        f"in={product.inner} is too long: {STRIP} rows of it take more than {budget >> 20} MiB"
    )


def occupied(
    tile: Tile, product: Product, dtype: jnp.dtype, x_dtype: jnp.dtype | None = None
) -> int:
    """Bytes of VMEM that a tile takes: what is read and written twice, for the copy under way."""
    inner = round_up(product.inner, LANES)
    weight_bits = 4 if product.weight_bits <= 4 else 8
    dot_bits = _bits(dtype)
    tokens = tile.rows * inner
    bits = 2 * inner * tile.columns * weight_bits
    bits += 2 * tile.rows * tile.columns * _bits(product.out_dtype)
    bits += 2 * 2 * tile.rows * LANES * 32  # Statistics: a row of lanes for each.
    bits += 2 * tile.rows * tile.slice * 32  # Accumulators, on their way out of the registers.
    if dot_bits != weight_bits:
        bits += inner * tile.slice * dot_bits
    if x_dtype is None:
        bits += tokens * (2 * 8 + (0 if jnp.dtype(dtype) == jnp.int8 else dot_bits))
    else:
        bits += 2 * tokens * _bits(x_dtype) + tokens * dot_bits + 3 * STRIP * inner * 32
    return bits // 8


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _even(size: int, cap: int, step: int) -> int:
    """A block up to `cap`, a multiple of `step`, of which few that waste little cover `size`."""
    fewest = -(-size // cap)
    sizes = (round_up(-(-size // count), step) for count in range(fewest, 2 * fewest + 1))
    return min(sizes, key=lambda block: -(-size // block) * (block + _STEP))


def _slice(rows: int, inner: int, columns: int, width: int) -> int:
    width = min(width, columns)
    widths = [n for n in range(width, columns + 1, width) if columns % n == 0]
    small = [n for n in widths if rows * inner * n <= _BODY or n <= 256]
    return max(small, default=width)


def _bits(dtype: jnp.dtype) -> int:
    return 4 if jnp.dtype(dtype) == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
