"""UMT5 text encoder (transformers, `modeling_umt5.py`, encoder half)."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.errors import UserError
from qvgen_jax.models.attention import attention
from qvgen_jax.models.layers import RMSNorm
from qvgen_jax.quant.dense import Dense


@dataclasses.dataclass(frozen=True)
class UMT5Config:
    """The fields of `text_encoder/config.json` that the encoder's shape depends on."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "UMT5Config":
        """From the contents of `config.json`; fields of the decoder and of training are ignored.

        Raises:
            UserError: not a UMT5 model, or another feed-forward than the gated GELU.
        """
        if fields.get("model_type", "umt5") != "umt5":
            raise UserError(
                f"model_type = {fields['model_type']!r} in the text encoder's config.json: "
                "only 'umt5' is supported, which all Wan models use"
            )
        if fields.get("feed_forward_proj", "gated-gelu") != "gated-gelu":
            raise UserError(
                f"feed_forward_proj = {fields['feed_forward_proj']!r} in the text encoder's "
                "config.json: only 'gated-gelu' is supported, which all Wan models use"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in fields.items() if name in names})


def relative_position_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of `key - query` for each pair, int32 `[query, key]`.

    Half of the buckets are for keys after the query; in each half, distances below a quarter of
    all buckets have one of their own, larger ones share logarithmically.
    """
    distance = np.arange(length)[None, :] - np.arange(length)[:, None]
    half = buckets // 2
    exact = half // 2
    after = np.where(distance > 0, half, 0)
    distance = np.abs(distance)
    # float32 as in PyTorch: at exact powers the truncation depends on the rounding of the log.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (after + np.where(distance < exact, distance, far)).astype(np.int32)


class UMT5Attention(nnx.Module):
    """Self-attention with unscaled logits and a relative-position bias of its own."""

    def __init__(self, config: UMT5Config, *, key: jax.Array, dtype: jnp.dtype):
        keys, inner = jax.random.split(key, 5), config.num_heads * config.d_kv
        build = {"dtype": dtype, "use_bias": False}
        self.q = Dense("q", config.d_model, inner, key=keys[0], **build)
        self.k = Dense("k", config.d_model, inner, key=keys[1], **build)
        self.v = Dense("v", config.d_model, inner, key=keys[2], **build)
        self.o = Dense("o", inner, config.d_model, key=keys[3], **build)
        # T5 starts q smaller because nothing divides its logits by sqrt(d_kv).
        self.q.kernel[...] = self.q.kernel[...] * config.d_kv**-0.5
        shape = (config.relative_attention_num_buckets, config.num_heads)
        table = jax.random.normal(keys[4], shape, jnp.float32) * config.d_model**-0.5
        self.relative_bias = nnx.Param(table)
        self.heads = config.num_heads

    def __call__(self, x: jax.Array, buckets: np.ndarray, mask: jax.Array) -> jax.Array:
        """`x [batch, n, d_model]`, `buckets [n, n]`, `mask` bool `[batch, 1, 1, n]`."""
        bias = self.relative_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]
        q, k, v = (self._split(project(x)) for project in (self.q, self.k, self.v))
        y = attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:-1], -1))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class GatedFeedForward(nnx.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh-approximated GELU, without biases."""

    def __init__(self, config: UMT5Config, *, key: jax.Array, dtype: jnp.dtype):
        keys = jax.random.split(key, 3)
        build = {"dtype": dtype, "use_bias": False}
        self.gate = Dense("gate", config.d_model, config.d_ff, key=keys[0], **build)
        self.up = Dense("up", config.d_model, config.d_ff, key=keys[1], **build)
        self.down = Dense("down", config.d_ff, config.d_model, key=keys[2], **build)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class UMT5Block(nnx.Module):
    """Attention and feed-forward, each after an RMS norm and added to its input."""

    def __init__(self, config: UMT5Config, *, key: jax.Array, dtype: jnp.dtype):
        keys = jax.random.split(key)
        self.attention = UMT5Attention(config, key=keys[0], dtype=dtype)
        self.ffn = GatedFeedForward(config, key=keys[1], dtype=dtype)
        self.norm_attention = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.norm_ffn = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dtype = dtype

    def __call__(self, x: jax.Array, buckets: np.ndarray, mask: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm_attention(x).astype(self.dtype), buckets, mask)
        return x + self.ffn(self.norm_ffn(x).astype(self.dtype))


class UMT5Encoder(nnx.Module):
    """Token ids to text embeddings.

    Args:
        key: PRNG key of the initial weights.
        dtype: in which products and activations are computed; norms and softmax are float32.
    """

    def __init__(self, config: UMT5Config, *, key: jax.Array, dtype: jnp.dtype = jnp.float32):
        keys = jax.random.split(key)
        shape = (config.vocab_size, config.d_model)
        self.token_embedding = nnx.Param(jax.random.normal(keys[0], shape, jnp.float32))

        def make_block(key: jax.Array) -> UMT5Block:
            return UMT5Block(config, key=key, dtype=dtype)

        self.blocks = jax.vmap(make_block)(jax.random.split(keys[1], config.num_layers))
        self.final_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.config = config
        self.dtype = dtype

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings `[batch, n, d_model]` in the encoder's dtype.

        Rows of padding are computed too, and mean nothing: the caller sets them to zero.

        Args:
            token_ids: int32 `[batch, n]`.
            mask: `[batch, n]`, nonzero where a token is real; padding is never attended.
        """
        config = self.config
        buckets = relative_position_buckets(
            token_ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        visible = (mask != 0)[:, None, None, :]

        def body(x: jax.Array, block: UMT5Block) -> tuple[jax.Array, None]:
            return block(x, buckets, visible), None

        x = self.token_embedding[...][token_ids].astype(self.dtype)
        x, _ = jax.lax.scan(body, x, self.blocks)
        return self.final_norm(x).astype(self.dtype)
