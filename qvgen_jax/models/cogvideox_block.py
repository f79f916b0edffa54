"""One block of the CogVideoX transformer: joint attention over text and video, and feed-forward."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.fused_quantize import Normalized
from kernels.reference import wide_type
from qvgen_jax.models.attention import attention
from qvgen_jax.models.layers import FeedForward, LayerNorm
from qvgen_jax.models.rope import rotate
from qvgen_jax.quant.apply import apply_normalized
from qvgen_jax.quant.dense import QuantContext


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("condition", "ctx"),
    meta_fields=("grid", "text_tokens"),
)
@dataclasses.dataclass(frozen=True)
class CogVideoXConditions:
    """What the blocks and the last layer know beside the tokens.

    Attributes:
        condition: float32 `[batch, time_dim]`, the activated embedding of the timestep.
        ctx: what quantized linears need.
        grid: patches along frames, height and width.
        text_tokens: how many of the tokens, at their start, are the prompt's.
    """

    condition: jax.Array
    ctx: QuantContext
    grid: tuple[int, int, int]
    text_tokens: int

    @property
    def tokens(self) -> int:
        """Without padding."""
        return self.text_tokens + math.prod(self.grid)


class ModulatedNorm(nnx.Module):
    """diffusers' `CogVideoXLayerNormZero`: one norm, modulated apart for text and video."""

    def __init__(
        self,
        name: str,
        time_dim: int,
        dim: int,
        eps: float,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        # One row per sample: float32 costs nothing here.
        self.linear = dense(f"{name}.linear", time_dim, 6 * dim, key=key, dtype=wide_type(dtype))
        self.norm = LayerNorm(dim, eps=eps)
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, condition: jax.Array, text_tokens: int, ctx: QuantContext
    ) -> tuple[Normalized, jax.Array]:
        """The modulated `x [batch, tokens, dim]` and the gate of what is computed from it, float32.

        Args:
            condition: float32 `[batch, time_dim]`, the activated embedding of the timestep.
            text_tokens: how many of the tokens, at their start, are the prompt's; not 0.
        """
        told = self.linear(condition, ctx.unpadded())
        of_video, of_text = jnp.split(told[:, None], 2, axis=-1)
        parts = jnp.concatenate([of_text, of_video], axis=1)
        shift, scale, gate = jnp.split(parts, 3, axis=-1)
        modulation = {"scale": scale, "shift": shift, "leading_rows": text_tokens}
        tokens = self.norm.tokens(x, self.dtype, **modulation)
        return tokens, tokens.per_token(gate)


class JointAttention(nnx.Module):
    """Multi-head self-attention whose q and k go through a LayerNorm per head."""

    def __init__(
        self,
        name: str,
        dim: int,
        heads: int,
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
        self.norm_q = LayerNorm(dim // heads, eps=1e-6)  # Not the config's norm_eps.
        self.norm_k = LayerNorm(dim // heads, eps=1e-6)
        self.heads = heads
        self.dtype = dtype

    def __call__(
        self,
        tokens: Normalized,
        ctx: QuantContext,
        rotary: tuple[jax.Array, jax.Array] | None,
        count: int,
    ) -> jax.Array:
        """Tokens `[batch, tokens, dim]` look at themselves; `rotary` has a row for each.

        The first `count` of them are no padding.
        """
        q, k, v = apply_normalized((self.to_q, self.to_k, self.to_v), tokens, ctx)
        q, k, v = self.norm_q(self._split(q)), self.norm_k(self._split(k)), self._split(v)
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (y.astype(self.dtype) for y in (q, k, v))
        y = attention(q, k, v, tokens=count)
        return self.to_out(y.reshape(tokens.x.shape), ctx)

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class CogVideoXBlock(nnx.Module):
    """diffusers' `CogVideoXBlock`, on text and video as one sequence."""

    def __init__(
        self,
        dim: int,
        heads: int,
        time_dim: int,
        eps: float,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        keys = jax.random.split(key, 4)
        norm = (time_dim, dim, eps)
        build = {"dense": dense, "dtype": dtype}
        self.norm1 = ModulatedNorm("blocks.norm1", *norm, key=keys[0], **build)
        self.attn1 = JointAttention("blocks.attn1", dim, heads, key=keys[1], **build)
        self.norm2 = ModulatedNorm("blocks.norm2", *norm, key=keys[2], **build)
        self.ffn = FeedForward("blocks.ffn", dim, 4 * dim, key=keys[3], **build)
        self.dtype = dtype

    def __call__(
        self,
        x: jax.Array,
        condition: jax.Array,
        text_tokens: int,
        rotary: tuple[jax.Array, jax.Array] | None,
        count: int,
        ctx: QuantContext,
    ) -> jax.Array:
        """The block on `x [batch, text and video tokens, dim]`.

        Args:
            condition: float32 `[batch, time_dim]`, the activated embedding of the timestep.
            text_tokens: how many of the tokens are the prompt's, at their start.
            rotary: table with a row per token; None where positions were added to the tokens.
            count: how many of x's tokens are no padding.
        """
        y, gate = self.norm1(x, condition, text_tokens, ctx)
        x = (x + self.attn1(y, ctx, rotary, count) * gate).astype(self.dtype)
        y, gate = self.norm2(x, condition, text_tokens, ctx)
        return (x + self.ffn(y, ctx) * gate).astype(self.dtype)
