"""Scaled dot-product attention: the one place that knows which implementation runs it."""

import jax
import jax.numpy as jnp


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`softmax(scale * q k^T + bias) v` with a float32 softmax.

    Args:
        query: `[batch, tokens, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`, as is `value`.
        bias: added to the logits, broadcasts to `[batch, heads, tokens, keys]`.
        mask: bool, True where a key may be seen, broadcasts like `bias`.
        scale: `head_dim ** -0.5` if None.

    Returns:
        `[batch, tokens, heads, head_dim]` in the dtype of `query`.
    """
    # cuDNN's fused kernel never writes the tokens x keys logits: 50 GB a layer at 480p without it.
    # With a bias it refuses odd lengths, and text, which has one, is short.
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    fits = half and query.shape[-1] % 8 == 0 and query.shape[-1] <= 128
    fused = jax.default_backend() == "gpu" and fits and bias is None and mask is None
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        bias=bias,
        mask=mask,
        scale=scale,
        implementation="cudnn" if fused else None,
    )
