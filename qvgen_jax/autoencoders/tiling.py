"""Video autoencoders tile by tile: equal numbers to diffusers' `enable_tiling()`.

Tiles overlap; where they do, the later one fades in over the earlier one, first from above, then
from the left. A tile keeps its own causal cache over all frames. Tiles of equal size share one
compiled body, so that the program has at most a few of them: inner, right edge, bottom, corner.
"""

import collections
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from qvgen_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The tiles of a video, in pixels.

    Attributes:
        height: of a tile; what is left at the bottom is smaller.
        width: of a tile; what is left at the right is smaller.
        stride_height: from the top of a tile to the next; `height - stride_height` is blended.
        stride_width: from the left of a tile to the next; `width - stride_width` is blended.

    Raises:
        UserError: a stride that is not between 1 and the tile's size.
    """

    height: int
    width: int
    stride_height: int
    stride_width: int

    def __post_init__(self) -> None:
        for axis in ("height", "width"):
            size, stride = getattr(self, axis), getattr(self, f"stride_{axis}")
            if not 1 <= stride <= size:
                raise UserError(
                    f"tiles have {axis} {size} and stride_{axis} {stride}; a stride lies between 1 "
                    f"and the {axis}, about three quarters of it"
                )

    def divided(self, factor: int) -> "Tiling":
        """The same tiles in latent pixels.

        Raises:
            UserError: the VAE's spatial factor does not divide a size or a stride.
        """
        for name, value in dataclasses.asdict(self).items():
            if value % factor:
                raise UserError(
                    f"the tiles' {name} is {value}; expected a multiple of {factor}, the pixels of "
                    f"a latent pixel, such as {max(value // factor, 1) * factor}"
                )
        return Tiling(**{k: v // factor for k, v in dataclasses.asdict(self).items()})


def run_tiles(
    run: Callable[[jax.Array], jax.Array], x: jax.Array, inputs: Tiling, outputs: Tiling
) -> jax.Array:
    """Runs `run` on every tile of `x` and blends the results.

    Args:
        run: `[b, t, h, w, c]` to `[b, t', h', w', c']`, sizes in proportion of the two tilings.
        x: `[b, t, H, W, c]`; run whole if it fits into one tile.
        inputs: tiles in pixels of `x`.
        outputs: the same tiles in pixels of the result.
    """
    height, width = x.shape[2:4]
    if height <= inputs.height and width <= inputs.width:
        return run(x)
    rows = _spans(height, inputs.height, inputs.stride_height)
    columns = _spans(width, inputs.width, inputs.stride_width)
    tiles = _run_each(run, x, rows, columns)
    fade_height = outputs.height - outputs.stride_height
    fade_width = outputs.width - outputs.stride_width
    bands, above = [], []
    for i in range(len(rows)):
        row: list[jax.Array] = []
        for j in range(len(columns)):
            tile = tiles[i, j]
            if i > 0:
                tile = _blend(above[j], tile, fade_height, axis=2)
            if j > 0:
                tile = _blend(row[j - 1], tile, fade_width, axis=3)
            row.append(tile)
        band = [tile[:, :, : outputs.stride_height, : outputs.stride_width] for tile in row]
        bands.append(jnp.concatenate(band, axis=3))
        above = row
    return jnp.concatenate(bands, axis=2)


def _spans(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    """`(start, size)` of the tiles along one axis."""
    return [(start, min(size, length - start)) for start in range(0, length, stride)]


def _run_each(
    run: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    rows: list[tuple[int, int]],
    columns: list[tuple[int, int]],
) -> dict[tuple[int, int], jax.Array]:
    """The result of every tile, by row and column; those of one size run in one loop."""
    groups = collections.defaultdict(list)
    for i, (_, height) in enumerate(rows):
        for j, (_, width) in enumerate(columns):
            groups[height, width].append((i, j))
    tiles = {}
    for (height, width), places in groups.items():
        size = (*x.shape[:2], height, width, x.shape[4])

        def run_at(corner: jax.Array, size: tuple[int, ...] = size) -> jax.Array:
            return run(jax.lax.dynamic_slice(x, (0, 0, corner[0], corner[1], 0), size))

        corners = jnp.array([(rows[i][0], columns[j][0]) for i, j in places], jnp.int32)
        results = jax.lax.map(run_at, corners)
        tiles |= {place: results[n] for n, place in enumerate(places)}
    return tiles


def _blend(before: jax.Array, tile: jax.Array, overlap: int, axis: int) -> jax.Array:
    """`tile`, its first rows (or columns) fading in over the last ones of `before`."""
    overlap = min(before.shape[axis], tile.shape[axis], overlap)
    length = tile.shape[axis]
    fading = jax.lax.slice_in_dim(before, before.shape[axis] - overlap, None, axis=axis)
    growing = jax.lax.slice_in_dim(tile, 0, overlap, axis=axis)
    shape = [1] * tile.ndim
    shape[axis] = overlap
    weight = (jnp.arange(overlap, dtype=jnp.float32) / max(overlap, 1)).reshape(shape)
    mixed = (fading * (1 - weight) + growing * weight).astype(tile.dtype)
    rest = jax.lax.slice_in_dim(tile, overlap, length, axis=axis)
    return jnp.concatenate([mixed, rest], axis=axis)
