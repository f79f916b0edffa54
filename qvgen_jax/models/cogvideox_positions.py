"""Where CogVideoX's tokens lie: sin-cos vectors that are added (2B), rotations (5B and 1.5)."""

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.models.rope import axial_table


def sincos_table(
    grid: tuple[int, int, int], dim: int, spatial_scale: float, temporal_scale: float
) -> jax.Array:
    """Vectors to be added to the tokens, float32 `[frames * rows * columns, dim]`.

    A quarter of the channels tells the frame, the rest the column, then the row (diffusers,
    `get_3d_sincos_pos_embed`). Angles are computed in float64. The table of a video in 480p is
    135 MB: it is put together on the device from one small table per axis.

    Args:
        grid: number of patches along frames, height and width.
        dim: a multiple of 16.
        spatial_scale: by which rows and columns are divided, `temporal_scale` the frames.
    """
    frames, rows, columns = grid
    scales = (temporal_scale, spatial_scale, spatial_scale)
    dims = (dim // 4, 3 * dim // 8, 3 * dim // 8)
    t, y, x = (
        jnp.asarray(_sincos(np.arange(length) / scale, part))
        for length, scale, part in zip(grid, scales, dims, strict=True)
    )
    parts = (t[:, None, None], x[None, None], y[None, :, None])
    spread = [jnp.broadcast_to(p, (frames, rows, columns, p.shape[-1])) for p in parts]
    return jnp.concatenate(spread, axis=-1).reshape(-1, dim)


def _sincos(places: np.ndarray, dim: int) -> np.ndarray:
    frequencies = 10000.0 ** -(np.arange(dim // 2) / (dim // 2))
    angles = np.outer(places, frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def rotations(
    grid: tuple[int, int, int],
    head_dim: int,
    base: tuple[int, int] | None,
    text_tokens: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Table of `rope.axial_table` for the text's tokens, which do not turn, and the video's.

    A quarter of the head tells the frame, the rest the row and the column in equal parts
    (diffusers, `get_3d_rotary_pos_embed`).

    Args:
        grid: number of patches along frames, height and width.
        head_dim: a multiple of 16.
        base: rows and columns of the size the 5B was trained at: another grid is fitted into it.
            None where every patch is one step (1.5). There diffusers cuts a longer table, whose
            length differs between revisions of the config.json and limits nothing here.
        text_tokens: how many tokens stand before the video's.
    """
    frames, rows, columns = (np.arange(length) for length in grid)
    if base is not None:
        rows, columns = _fitted(grid[1:], base)
    dims = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    cos, sin = axial_table([frames, rows, columns], dims)
    still = ((text_tokens, 0), (0, 0), (0, 0))
    return np.pad(cos, still, constant_values=1), np.pad(sin, still)


def _fitted(grid: tuple[int, int], base: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of `grid`, scaled to the largest size of its shape that fits into `base`."""
    (rows, columns), (height, width) = grid, base
    if rows / columns > height / width:
        size = (height, round(height / rows * columns))
    else:
        size = (round(width / columns * rows), width)
    places = []
    for length, inside, limit in zip(grid, size, base, strict=True):
        start = round((limit - inside) / 2)
        places.append(np.linspace(start, (start + inside) * (length - 1) / length, length))
    return places[0], places[1]
