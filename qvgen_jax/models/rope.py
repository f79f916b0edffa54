"""Rotary positions over frames, rows and columns."""

import jax
import numpy as np

from kernels.reference import at_least_float32


def rotary_table(
    grid: tuple[int, int, int], head_dim: int, theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Wan's table (diffusers, `WanRotaryPosEmbed`), as of `axial_table`.

    The head is split into a temporal part and two spatial ones of `2 * (head_dim // 6)`.

    Args:
        grid: number of patches along frames, height and width.
    """
    spatial = 2 * (head_dim // 6)
    dims = (head_dim - 2 * spatial, spatial, spatial)
    return axial_table([np.arange(length) for length in grid], dims, theta)


def axial_table(
    positions: list[np.ndarray], dims: tuple[int, int, int], theta: float = 10000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and signed sines of every token, both float32 `[tokens, 1, head_dim]`.

    Angles are computed in float64. Channels `2i` and `2i + 1` are one complex number, so each value
    stands twice, and the sine of the even channel carries the minus sign of the rotation.

    Args:
        positions: where the frames, the rows and the columns of the grid lie.
        dims: channels of the head for each of them; their sum is `head_dim`.
    """
    grid = tuple(map(len, positions))
    parts = []
    for axis, (places, dim) in enumerate(zip(positions, dims, strict=True)):
        frequencies = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles = np.outer(places, frequencies)
        shape = [1, 1, 1, angles.shape[1]]
        shape[axis] = grid[axis]
        parts.append(np.broadcast_to(angles.reshape(shape), (*grid, angles.shape[1])))
    angles = np.concatenate(parts, axis=-1).reshape(-1, 1, sum(dims) // 2)
    cos = np.repeat(np.cos(angles), 2, axis=-1)
    sin = np.repeat(np.sin(angles), 2, axis=-1)
    sin[..., 0::2] *= -1
    return cos.astype(np.float32), sin.astype(np.float32)


def pad_table(
    table: tuple[np.ndarray, np.ndarray] | None, tokens: int
) -> tuple[np.ndarray, np.ndarray] | None:
    """The table with rows of zeros behind, for so many tokens; None stays None."""
    if table is None:
        return None
    cos, sin = (np.pad(part, ((0, tokens - len(part)), (0, 0), (0, 0))) for part in table)
    return cos, sin


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate `x [batch, tokens, heads, head_dim]` by its position, in float32."""
    cos, sin = table
    x = at_least_float32(x)
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return x * cos + swapped * sin
