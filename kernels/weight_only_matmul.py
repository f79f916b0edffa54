"""W4A16: packed weights times floats, for few rows, where reading the weight is all the time."""

import jax
import jax.numpy as jnp

from kernels.layouts import halves, unlay
from kernels.operands import Weight


def weight_only_matmul(
    x: jax.Array, weight: Weight, *, layout: str = "rows", out_dtype: jnp.dtype = jnp.bfloat16
) -> jax.Array:
    """`x @ dequantized weights + bias`; the weight stays in its codes in memory.

    The codes are multiplied as they are, exact in x's dtype, and scale and zero point come after,
    in float32: `scale * (x @ W - w sum(x))`. It is memory's product, not the matrix unit's: at the
    tens of thousands of rows of a video it saves bytes and no time.

    Args:
        x: `[..., in]`, bfloat16 or float32.
        weight: its codes in `layout`, of up to 8 bits.
        layout: see `kernels.layouts`.
        out_dtype: of the result.

    Returns:
        `[..., out]`.
    """
    inner = x.shape[-1]

    def dot(left: jax.Array, right: jax.Array) -> jax.Array:
        right = right.astype(jnp.int8).astype(x.dtype)
        return jnp.matmul(left, right, preferred_element_type=jnp.float32)

    if layout.endswith("_halved"):
        low, high = halves(weight.codes if layout.startswith("rows") else weight.codes.T)
        half = len(low)
        y = dot(x[..., :half], low) + dot(x[..., half:], high[: inner - half])
    else:
        y = dot(x, unlay(weight.codes, inner, layout))
    if weight.zero_point is not None:
        y = y - jnp.sum(x, axis=-1, keepdims=True, dtype=jnp.float32) * weight.zero_point
    y = y * weight.scale
    if weight.bias is not None:
        y = y + weight.bias
    return y.astype(out_dtype)
