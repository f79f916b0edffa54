"""One block of the Wan transformer: self-attention, cross-attention and feed-forward."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.fused_quantize import Normalized
from kernels.reference import at_least_float32
from qvgen_jax.models.attention import attention
from qvgen_jax.models.layers import FeedForward, LayerNorm, RMSNorm
from qvgen_jax.models.rope import rotate
from qvgen_jax.quant.apply import apply_each, apply_normalized
from qvgen_jax.quant.dense import QuantContext


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("embedding", "modulation", "text", "ctx"),
    meta_fields=("grid",),
)
@dataclasses.dataclass(frozen=True)
class WanConditions:
    """What the blocks and the last layer know beside the tokens.

    Attributes:
        embedding: of the timestep, float32 `[batch, dim]`.
        modulation: float32 `[batch, 6, dim]`, before each block adds its table.
        text: `[batch, text tokens, dim]`.
        ctx: what quantized linears need.
        grid: patches along frames, height and width.
    """

    embedding: jax.Array
    modulation: jax.Array
    text: jax.Array
    ctx: QuantContext
    grid: tuple[int, int, int]


class WanAttention(nnx.Module):
    """Multi-head attention whose q and k are RMS-normalised over the full inner dimension."""

    def __init__(
        self,
        name: str,
        dim: int,
        heads: int,
        eps: float,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        keys = jax.random.split(key, 4)
        self.to_q = dense(f"{name}.to_q", dim, dim, key=keys[0], dtype=dtype)
        self.to_k = dense(f"{name}.to_k", dim, dim, key=keys[1], dtype=dtype)
        self.to_v = dense(f"{name}.to_v", dim, dim, key=keys[2], dtype=dtype)
        self.to_out = dense(f"{name}.to_out", dim, dim, key=keys[3], dtype=dtype)
        self.norm_q = RMSNorm(dim, eps=eps)
        self.norm_k = RMSNorm(dim, eps=eps)
        self.heads = heads
        self.dtype = dtype

    def __call__(
        self,
        tokens: Normalized,
        ctx: QuantContext,
        *,
        context: jax.Array | None = None,
        rotary: tuple[jax.Array, jax.Array] | None = None,
        count: int | None = None,
    ) -> jax.Array:
        """Tokens `[batch, tokens, dim]` look at `context [batch, keys, dim]`, or at themselves.

        Then `count` says how many of them are no padding, and `rotary` where they are.
        """
        if context is None:
            q, k, v = apply_normalized((self.to_q, self.to_k, self.to_v), tokens, ctx)
        else:
            (q,) = apply_normalized([self.to_q], tokens, ctx)
            k, v = apply_each((self.to_k, self.to_v), context, ctx.unpadded())
        q, k, v = self._split(self.norm_q(q)), self._split(self.norm_k(k)), self._split(v)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (y.astype(self.dtype) for y in (q, k, v))
        y = attention(q, k, v, tokens=count)
        return self.to_out(y.reshape(tokens.x.shape), ctx)

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class WanBlock(nnx.Module):
    """diffusers' `WanTransformerBlock`; its norm1 and norm3 have no parameters."""

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        eps: float,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        keys = jax.random.split(key, 4)
        build = {"dense": dense, "dtype": dtype}
        self.attn1 = WanAttention("blocks.attn1", dim, heads, eps, key=keys[0], **build)
        self.attn2 = WanAttention("blocks.attn2", dim, heads, eps, key=keys[1], **build)
        self.norm2 = LayerNorm(dim, eps=eps)
        self.ffn = FeedForward("blocks.ffn", dim, hidden, key=keys[2], **build)
        table = jax.random.normal(keys[3], (1, 6, dim), jnp.float32) * dim**-0.5
        self.scale_shift_table = nnx.Param(table)
        self.eps = eps
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        text: jax.Array,
        modulation: jax.Array,
        rotary: tuple[jax.Array, jax.Array],
        count: int,
        ctx: QuantContext,
    ) -> jax.Array:
        """The block on `x [batch, tokens, dim]`.

        Args:
            text: `[batch, text tokens, dim]`; unmasked, as padding is attended in Wan.
            modulation: float32 `[batch, 6, dim]`: shift, scale, gate of attention, then of the ffn.
            rotary: table of `rotary_table`.
            count: how many of x's tokens are no padding.
        """
        table = at_least_float32(self.scale_shift_table[...]) + modulation
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = jnp.split(table, 6, axis=1)

        y = Normalized(x, self.eps, self.dtype, scale=scale, shift=shift)
        x = (x + self.attn1(y, ctx, rotary=rotary, count=count) * gate).astype(self.dtype)
        x = x + self.attn2(self.norm2.tokens(x, self.dtype), ctx, context=text)
        y = Normalized(x, self.eps, self.dtype, scale=ffn_scale, shift=ffn_shift)
        return (x + self.ffn(y, ctx) * ffn_gate).astype(self.dtype)
