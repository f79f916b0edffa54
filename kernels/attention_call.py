"""What an attention backend is asked before it takes a call."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

KEPT = "attention"
"""What attention's results are called in the policies of `jax.checkpoint`, see `kept_name`."""

# Of a prompt. Attention to no more keys is cheaper to repeat than its result is to keep.
_FEW_KEYS = 512


class AttentionCall(NamedTuple):
    """What a backend needs to know of a call to take it or refuse.

    Attributes:
        tokens: that ask; 32760 in Wan's self-attention at 480 x 832 pixels and 81 frames.
        keys: that are looked at; 512 in Wan's cross-attention.
        heads: of the queries and of the keys.
        dtype: of query, key and value.
        bias, mask: whether there is one.
    """

    batch: int
    tokens: int
    keys: int
    heads: int
    head_dim: int
    dtype: jnp.dtype
    bias: bool = False
    mask: bool = False

    def __str__(self) -> str:
        extra = "".join(
            f" with a {what}" for what, held in (("bias", self.bias), ("mask", self.mask)) if held
        )
        return (
            f"{self.batch} x {self.tokens} tokens to {self.keys}, {self.heads} heads of "
            f"{self.head_dim}, {jnp.dtype(self.dtype).name}{extra}"
        )


def kept_name(keys: int) -> str | None:
    """`KEPT` where repeating the attention to so many keys costs more than keeping its result."""
    return KEPT if keys > _FEW_KEYS else None


def call_of(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
) -> AttentionCall:
    """The call that these arrays make.

    Args:
        query: `[batch, tokens, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`, as is `value`.
        bias: broadcasts to `[batch, heads, tokens, keys]`, as does `mask`.

    Raises:
        ValueError: shapes or types that do not belong together.
    """
    arrays = {"query": query, "key": key, "value": value}
    shapes = ", ".join(f"{name} {x.shape} {x.dtype}" for name, x in arrays.items())
    if query.ndim != 4 or key.ndim != 4:
        raise ValueError(f"{shapes}; expected [batch, tokens, heads, head_dim]: reshape them")
    batch, tokens, heads, dim = query.shape
    if key.shape != value.shape or (key.shape[0], *key.shape[2:]) != (batch, heads, dim):
        raise ValueError(f"{shapes}; expected the same batch, heads and head_dim: repeat the keys")
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"{shapes}; expected one type: cast them to the model's")
    logits = (batch, heads, tokens, key.shape[1])
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and not _broadcasts(x.shape, logits):
            raise ValueError(f"{name} {x.shape} does not broadcast to {logits}: give it four axes")
    return AttentionCall(
        batch, tokens, key.shape[1], heads, dim, query.dtype, bias is not None, mask is not None
    )


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) == len(to) and all(n in (1, m) for n, m in zip(shape, to, strict=True))


def refuse_bias_and_mask(call: AttentionCall) -> None:
    """Raises NotImplementedError if there is one."""
    for what, held in (("bias", call.bias), ("mask", call.mask)):
        if held:
            raise NotImplementedError(f"it is not given a {what}")
