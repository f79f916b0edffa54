"""int8 weights of a text encoder: a quarter of float32's memory, for a network that runs once.

A matrix is `codes * scale` as in `qvgen_jax.quant.byte_dense`, which multiplies by them; of an
embedding every row has its scale.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.errors import UserError

_ROWS = 4096  # quantized at a time, so that no matrix is ever in float32 as a whole


def quantize_rows(weight: np.ndarray, name: str) -> tuple[np.ndarray, np.ndarray]:
    """`weight [rows, n]` in any float type as codes, int8 `[rows, n]`, and scale, float32 `[rows]`.

    Rows of zeros get scale 0.

    Raises:
        UserError: a weight is infinite or not a number; the message gives `name`.
    """
    codes, scale = np.empty(weight.shape, np.int8), np.empty(len(weight), np.float32)
    for start in range(0, len(weight), _ROWS):
        rows = slice(start, start + _ROWS)
        block = weight[rows].astype(np.float32)
        step = np.abs(block).max(1) / np.float32(127)
        if not np.isfinite(step).all():
            raise UserError(
                f"{name} holds infinite values or NaN, expected finite weights; fetch it again"
            )
        codes[rows] = np.rint(block / np.where(step > 0, step, 1)[:, None], out=block)
        scale[rows] = step
    return codes, scale


class Int8Embedding(nnx.Module):
    """A table of rows: `codes` int8 `[rows, dim]`, `scale` float32 `[rows]`."""

    def __init__(self, rows: int, dim: int):
        self.codes = nnx.Param(jnp.zeros((rows, dim), jnp.int8))
        self.scale = nnx.Param(jnp.ones((rows,), jnp.float32))

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        """float32 `[..., dim]` of integers `[...]`."""
        return self.codes[...][ids].astype(jnp.float32) * self.scale[...][ids][..., None]
