"""int8 weights of a text encoder: a quarter of float32's memory, for a network that runs once.

A matrix is `codes * scale`: codes -127..127, one float32 scale per output channel (per row of an
embedding), so that its largest weight is exact. Codes are exact in bfloat16 too: a product on
them, scaled afterwards, has no other error than theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.low_rank import rows_matmul
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


class Int8Dense(nnx.Module):
    """`Dense` without bias at inference: `codes` int8 `[in, out]`, `scale` float32 `[out]`."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
    ):
        del name, key  # Nothing is drawn: the values are loaded.
        self.codes = nnx.Param(jnp.zeros((in_features, out_features), jnp.int8))
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [..., in]` to `[..., out]` in the layer's dtype."""
        y = rows_matmul(x.astype(self.dtype), self.codes[...].astype(self.dtype))
        return (y * self.scale[...]).astype(self.dtype)


class Int8Embedding(nnx.Module):
    """A table of rows: `codes` int8 `[rows, dim]`, `scale` float32 `[rows]`."""

    def __init__(self, rows: int, dim: int):
        self.codes = nnx.Param(jnp.zeros((rows, dim), jnp.int8))
        self.scale = nnx.Param(jnp.ones((rows,), jnp.float32))

    def __getitem__(self, ids: jax.Array) -> jax.Array:
        """float32 `[..., dim]` of integers `[...]`."""
        return self.codes[...][ids].astype(jnp.float32) * self.scale[...][ids][..., None]
