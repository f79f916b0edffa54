"""Linear layers: full precision here, quantized beside it, behind one calling convention."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class QuantContext(NamedTuple):
    """What every quantizable linear needs to know about the step it runs in.

    Attributes:
        clip_index: int32 `[batch]`, which learned clip pair each sample uses; None for plain layers.
        gate: float32 `[rank]`, the weight of each component of the low-rank branch; None once it is gone.
    """

    clip_index: jax.Array | None = None
    gate: jax.Array | None = None


class Dense(nnx.Module):
    """`y = x @ kernel + bias` in full precision: `x [..., in]` to `[..., out]`."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        use_bias: bool = True,
    ):
        del name  # A dense factory chooses by name; the plain layer has no choice to make.
        bound = in_features**-0.5
        shape = (in_features, out_features)
        self.kernel = nnx.Param(jax.random.uniform(key, shape, jnp.float32, -bound, bound))
        self.bias = nnx.Param(jnp.zeros((out_features,), jnp.float32)) if use_bias else None
        self.dtype = dtype

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        y = jnp.matmul(
            x.astype(self.dtype),
            self.kernel[...].astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y.astype(self.dtype)
