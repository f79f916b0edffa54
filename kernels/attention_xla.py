"""Attention by XLA alone, in chunks of queries: no device holds the logits of a whole video."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.attention_call import AttentionCall, call_of, kept_name
from kernels.reference import wide_type
from kernels.target import target

# Logits held at once on a CPU: 64 MB in float32, about a last-level cache.
_OF_ONE_HEAD = 2**24
# And on an accelerator: 512 MB for all heads together, which are one product there.
_OF_ALL_HEADS = 2**27
_FEWEST_QUERIES = 128  # A matrix unit's height: shorter chunks would leave it idle.
_MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)  # Finite: a row without keys gets their mean.


def check(call: AttentionCall) -> None:
    """Takes every call."""


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    by_head: bool | None = None,
) -> jax.Array:
    """`kernels.attention.attention` on any device, whole where it is short.

    Long sequences go in chunks of queries, recomputed in the backward pass (Rabe and Staats,
    https://arxiv.org/abs/2112.05682, without their chunks of keys). On a CPU it is one head at a
    time, 1.7 (float32) to 2.9 (bfloat16) times faster there at 4680 tokens; elsewhere, and with a
    bias or a mask, all heads go together, which also leaves batch and heads to be sharded.

    Args:
        by_head: whether one head at a time; None chooses by `kernels.target`.
    """
    call = call_of(query, key, value, bias, mask)
    if by_head is None:
        by_head = target().platform == "cpu" and not (call.bias or call.mask)
    if by_head and (call.bias or call.mask):
        raise ValueError("by_head=True with a bias or a mask; expected neither: leave it out")
    logits = call.tokens * call.keys
    heads = 1 if by_head else call.batch * call.heads
    short = heads * logits <= (_OF_ONE_HEAD // 16 if by_head else _OF_ALL_HEADS)
    if short and query.dtype != jnp.float64:  # Its softmax is float32, whatever the query is.
        return jax.nn.dot_product_attention(query, key, value, bias=bias, mask=mask, scale=scale)

    held = _OF_ONE_HEAD if by_head else _OF_ALL_HEADS
    size = min(call.tokens, max(held // (heads * call.keys), _FEWEST_QUERIES))
    size = -(-call.tokens // -(-call.tokens // size))  # As many chunks, but equal ones.
    scale = call.head_dim**-0.5 if scale is None else scale
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    if not by_head:
        y = _in_chunks(q, k, v, bias, mask, scale, size)
    else:
        rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        y = jax.lax.map(lambda head: _in_chunks(*head, None, None, scale, size), rows)
    y, name = y.reshape(q.shape).transpose(0, 2, 1, 3), kept_name(call.keys)
    return checkpoint_name(y, name) if name else y


def _in_chunks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None,
    mask: jax.Array | None,
    scale: float,
    size: int,
) -> jax.Array:
    """`[..., tokens, head_dim]`, with the logits of `size` queries at a time."""
    dtype = query.dtype
    # The backward pass adds the chunks' gradients up in this type. XLA leaves nothing else of it.
    wide = wide_type(dtype)
    key, value = key.astype(wide), value.astype(wide)
    leading = tuple(range(query.ndim - 2))

    @jax.checkpoint
    def chunk(rows: tuple[jax.Array, jax.Array | None, jax.Array | None]) -> jax.Array:
        q, of_bias, of_mask = rows
        k, v = key.astype(dtype), value.astype(dtype)
        # Not a product with k.T: XLA's CPU backend transposes, and then multiplies, in float32.
        last = ((query.ndim - 1,), (query.ndim - 1,))
        logits = jax.lax.dot_general(q, k, (last, (leading, leading)), preferred_element_type=wide)
        logits = logits * scale
        if bias is not None:
            logits = logits + (bias if of_bias is None else of_bias)
        if mask is not None:
            logits = jnp.where(mask if of_mask is None else of_mask, logits, _MASKED)
        weights = jnp.exp(logits - logits.max(-1, keepdims=True))
        total = weights.sum(-1, keepdims=True)
        y = jnp.matmul(weights.astype(dtype), v, preferred_element_type=wide)
        return (y / total).astype(dtype)

    def cut(x: jax.Array | None) -> jax.Array | None:
        """Into chunks `[chunks, ..., size, n]`; None where all queries share one row."""
        if x is None or x.shape[-2] == 1:
            return None
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % size), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:-2], -1, size, x.shape[-1]), -3, 0)

    y = jnp.moveaxis(jax.lax.map(chunk, (cut(query), cut(bias), cut(mask))), 0, -3)
    return y.reshape(*y.shape[:-3], -1, y.shape[-1])[..., : query.shape[-2], :]
