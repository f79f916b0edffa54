"""A linear whose weights are a byte each and whose tokens are not rounded: half of bfloat16.

A kernel is `codes * scale`, codes -127..127 and one float32 scale per output channel, so that its
largest weight is exact. Codes are exact in bfloat16 too: a product on them, scaled afterwards, has
no other error than theirs.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.low_rank import rows_matmul
from qvgen_jax.quant.dense import QuantContext
from qvgen_jax.sharding import cut, gathered


class ByteDense(nnx.Module):
    """`Dense` of loaded weights: `codes` int8 `[in, out]`, `scale` float32 `[out]`, `bias` `[out]`.

    Over a run's mesh codes are what travels, if they are `cut`.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        use_bias: bool = True,
        cut: bool = True,
    ):
        del key  # Nothing is drawn: the values are loaded.
        self.codes = nnx.Param(jnp.zeros((in_features, out_features), jnp.int8))
        self.scale = nnx.Param(jnp.ones((out_features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.name, self.dtype, self.cut = name, dtype, cut

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        """`x [..., in]` to `[..., out]` in the layer's dtype."""
        path, codes = f"{self.name}.codes", self.codes[...]
        if self.cut:
            codes = gathered(cut(codes, path), path)
        y = rows_matmul(x.astype(self.dtype), codes.astype(self.dtype)) * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)


def kernel_as_bytes(kernel: jax.Array) -> dict[str, jax.Array]:
    """The `codes` and `scale` of kernels `[..., in, out]`; channels of zeros get scale 0."""
    step = jnp.max(jnp.abs(kernel), axis=-2).astype(jnp.float32) / 127
    safe = jnp.where(step > 0, step, 1)[..., None, :]
    return {"codes": jnp.rint(kernel.astype(jnp.float32) / safe).astype(jnp.int8), "scale": step}
