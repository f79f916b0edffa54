"""T5 v1.1 and UMT5 text encoders (transformers, `modeling_t5.py`, `modeling_umt5.py`).

They differ in one thing. T5, CogVideoX's, has one table of relative-position biases for all layers
(PyTorch keeps it in the first); UMT5, Wan's, has one in every layer.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.attention import attention
from qvgen_jax.config_fields import Layers, Positive, Range, check_fields, refusal
from qvgen_jax.errors import UserError
from qvgen_jax.layer_scan import layer_scan
from qvgen_jax.models.layers import RMSNorm
from qvgen_jax.quant.byte_dense import ByteDense
from qvgen_jax.quant.dense import Dense
from qvgen_jax.text.int8 import Int8Embedding


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The fields of `text_encoder/config.json` that the encoder depends on."""

    vocab_size: int = 256384
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: Layers = 24
    num_heads: int = 64
    relative_attention_num_buckets: Annotated[int, Range(least=4)] = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: Positive = 1e-6
    model_type: str = "umt5"

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "T5Config":
        """From the contents of `config.json`; fields of the decoder and of training are ignored.

        Raises:
            UserError: neither T5 nor UMT5, another feed-forward than the gated GELU, or a value
                that is not of its field's kind or range.
        """
        kind = fields.get("model_type", "umt5")
        if kind not in ("t5", "umt5"):
            raise UserError(
                f"model_type = {kind!r} in the text encoder's config.json: supported are 't5', "
                "which CogVideoX uses, and 'umt5', which Wan uses"
            )
        # transformers' defaults: T5 v1.0's ReLU for the one, the gated GELU for the other.
        projection = fields.get("feed_forward_proj", "relu" if kind == "t5" else "gated-gelu")
        if projection != "gated-gelu":
            raise UserError(
                f"feed_forward_proj = {projection!r} in the text encoder's config.json: only "
                "'gated-gelu' is supported, which T5 v1.1 and UMT5 have"
            )
        names = {field.name for field in dataclasses.fields(cls)}
        config = cls(**{name: value for name, value in fields.items() if name in names})
        what = "the text encoder's config.json"
        check_fields(config, what)
        # See `relative_position_buckets`: it divides by the log of how far one is from the other.
        exact = config.relative_attention_num_buckets // 4
        distance = config.relative_attention_max_distance
        if distance <= exact:
            raise refusal(
                "relative_attention_max_distance",
                distance,
                what,
                f"more than {exact}, a quarter of relative_attention_num_buckets",
            )
        return config

    @property
    def shares_bias(self) -> bool:
        """Whether all layers add the same relative-position bias."""
        return self.model_type == "t5"


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


def _bias_table(config: T5Config, key: jax.Array) -> nnx.Param:
    """What each bucket of relative positions adds to the logits of each head."""
    shape = (config.relative_attention_num_buckets, config.num_heads)
    return nnx.Param(jax.random.normal(key, shape, jnp.float32) * config.d_model**-0.5)


def _position_bias(table: nnx.Param, buckets: np.ndarray) -> jax.Array:
    """float32 `[1, heads, n, n]` of a table `[buckets, heads]` and `buckets [n, n]`."""
    return table[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)[None]


class T5Attention(nnx.Module):
    """Self-attention with unscaled logits and a relative-position bias, its own or shared."""

    def __init__(self, config: T5Config, *, key: jax.Array, dense: Callable[..., nnx.Module]):
        keys, inner = jax.random.split(key, 5), config.num_heads * config.d_kv
        self.q = dense("q", config.d_model, inner, key=keys[0])
        self.k = dense("k", config.d_model, inner, key=keys[1])
        self.v = dense("v", config.d_model, inner, key=keys[2])
        self.o = dense("o", inner, config.d_model, key=keys[3])
        if isinstance(self.q, Dense):
            # T5 starts q smaller because nothing divides its logits by sqrt(d_kv).
            self.q.kernel[...] = self.q.kernel[...] * config.d_kv**-0.5
        if not config.shares_bias:
            self.relative_bias = _bias_table(config, keys[4])
        self.heads = config.num_heads

    def __call__(
        self, x: jax.Array, buckets: np.ndarray, shared_bias: jax.Array | None, mask: jax.Array
    ) -> jax.Array:
        """`x [batch, n, d_model]`, `buckets [n, n]`, `mask` bool `[batch, 1, 1, n]`."""
        bias = shared_bias
        if bias is None:
            bias = _position_bias(self.relative_bias, buckets)
        q, k, v = (self._split(project(x)) for project in (self.q, self.k, self.v))
        y = attention(q, k, v, bias=bias, mask=mask, scale=1.0)
        return self.o(y.reshape(*x.shape[:-1], -1))

    def _split(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class GatedFeedForward(nnx.Module):
    """`down(gelu(gate(x)) * up(x))` with the tanh-approximated GELU, without biases."""

    def __init__(self, config: T5Config, *, key: jax.Array, dense: Callable[..., nnx.Module]):
        keys = jax.random.split(key, 3)
        self.gate = dense("gate", config.d_model, config.d_ff, key=keys[0])
        self.up = dense("up", config.d_model, config.d_ff, key=keys[1])
        self.down = dense("down", config.d_ff, config.d_model, key=keys[2])

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x), approximate=True) * self.up(x))


class T5Block(nnx.Module):
    """Attention and feed-forward, each after an RMS norm and added to its input."""

    def __init__(
        self,
        config: T5Config,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
        dense: Callable[..., nnx.Module],
    ):
        keys = jax.random.split(key)
        self.attention = T5Attention(config, key=keys[0], dense=dense)
        self.ffn = GatedFeedForward(config, key=keys[1], dense=dense)
        self.norm_attention = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.norm_ffn = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.dtype = dtype

    def __call__(
        self, x: jax.Array, buckets: np.ndarray, shared_bias: jax.Array | None, mask: jax.Array
    ) -> jax.Array:
        y = self.norm_attention(x).astype(self.dtype)
        x = x + self.attention(y, buckets, shared_bias, mask)
        return x + self.ffn(self.norm_ffn(x).astype(self.dtype))


class T5Encoder(nnx.Module):
    """Token ids to text embeddings.

    Args:
        key: PRNG key of the initial weights.
        dtype: in which products and activations are computed; norms and softmax are float32.
        weights: "float", or "int8" for an encoder whose loaded matrices and embedding are codes
            and scales (`qvgen_jax.text.int8`), turned into `dtype` one layer at a time.
    """

    def __init__(
        self,
        config: T5Config,
        *,
        key: jax.Array,
        dtype: jnp.dtype = jnp.float32,
        weights: str = "float",
    ):
        keys = jax.random.split(key, 3)
        shape = (config.vocab_size, config.d_model)
        if weights == "int8":
            dense = partial(ByteDense, dtype=dtype, use_bias=False, cut=False)
            self.token_embedding = Int8Embedding(*shape)
        else:
            dense = partial(Dense, dtype=dtype, use_bias=False, cut=False)
            self.token_embedding = nnx.Param(jax.random.normal(keys[0], shape, jnp.float32))

        def make_block(key: jax.Array) -> T5Block:
            return T5Block(config, key=key, dtype=dtype, dense=dense)

        self.blocks = jax.vmap(make_block)(jax.random.split(keys[1], config.num_layers))
        if config.shares_bias:
            self.relative_bias = _bias_table(config, keys[2])
        self.final_norm = RMSNorm(config.d_model, eps=config.layer_norm_epsilon)
        self.config = config
        self.dtype = dtype

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Embeddings `[batch, n, d_model]` in the encoder's dtype.

        Rows of padding are computed too, and where the mask hides them mean nothing: the caller
        sets them to zero.

        Args:
            token_ids: int32 `[batch, n]`.
            mask: `[batch, n]`, nonzero where a token may be attended.
        """
        config = self.config
        buckets = relative_position_buckets(
            token_ids.shape[1],
            config.relative_attention_num_buckets,
            config.relative_attention_max_distance,
        )
        shared_bias = _position_bias(self.relative_bias, buckets) if config.shares_bias else None
        visible = (mask != 0)[:, None, None, :]

        def body(x: jax.Array, block: T5Block) -> tuple[jax.Array, None]:
            return block(x, buckets, shared_bias, visible), None

        x = self.token_embedding[token_ids].astype(self.dtype)
        x, _ = layer_scan(body, x, self.blocks)
        return self.final_norm(x).astype(self.dtype)
