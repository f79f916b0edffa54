"""The Wan 2.1 text-to-video transformer (diffusers, `transformer_wan.py`), channels last."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.fused_quantize import Normalized, gelu
from kernels.reference import at_least_float32, wide_type
from qvgen_jax.config_fields import Even, Layers, Positive, check_fields
from qvgen_jax.errors import UserError
from qvgen_jax.models.layers import (
    TwoLinears,
    linear,
    patchify,
    timestep_embedding,
    unpatchify,
)
from qvgen_jax.models.remat import recomputed
from qvgen_jax.models.rope import pad_table, rotary_table
from qvgen_jax.models.stack import Segments, build_blocks, scan_blocks
from qvgen_jax.models.wan_block import WanBlock, WanConditions
from qvgen_jax.quant import clips
from qvgen_jax.quant.apply import apply_normalized
from qvgen_jax.quant.dense import Dense, QuantContext
from qvgen_jax.quant.time_table import nearest_entry
from qvgen_jax.sharding import over_tokens, pad_tokens

TEXT_ONLY = (
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "blocks.attn2.to_k",
    "blocks.attn2.to_v",
)
"""Linears that see only the prompt: nothing in them depends on the timestep."""

TIME_ONLY = (
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
)
"""Linears that see only the timestep."""

TIME_OUTPUTS = TIME_ONLY[1:]
"""Those of them that others read."""

VALUES_OF = {
    "blocks.attn1.to_out": "blocks.attn1.to_v",
    "blocks.attn2.to_out": "blocks.attn2.to_v",
}
"""Linears that see attention's outputs, and those that make its values.

Attention mixes tokens, head by head: a map of channels within heads may come before or after it.
"""

AFTER_BLOCKS = ("proj_out",)
"""Linears behind the last block."""

# Fields of config.json that only other variants of Wan use, and the value that Wan 2.1 T2V has.
_FIXED = {
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclasses.dataclass(frozen=True)
class WanConfig:
    """The fields of a Wan transformer's `config.json` that vary between text-to-video models."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: Even = 128
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: Even = 256
    ffn_dim: int = 13824
    num_layers: Layers = 40
    eps: Positive = 1e-6
    rope_max_seq_len: int = 1024

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "WanConfig":
        """From the contents of `config.json`; keys with a leading underscore are notes.

        Raises:
            UserError: the file describes another variant (image-to-video, VACE, ...), or a value is
                not of its field's kind or range.
        """
        fields = dict(fields)
        name = fields.get("_class_name", "WanTransformer3DModel")
        fields.pop("quantization_config", None)
        values = {key: value for key, value in fields.items() if not key.startswith("_")}
        for key, expected in _FIXED.items():
            if values.pop(key, expected) != expected:
                raise UserError(
                    f"{key} = {fields[key]!r} in the transformer's config.json: only Wan 2.1 "
                    f"text-to-video models are supported, which have {key} = {expected!r}"
                )
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if name != "WanTransformer3DModel" or unknown:
            raise UserError(
                f"the transformer's config.json is of a {name} with unknown fields {unknown}: "
                "supported is WanTransformer3DModel of Wan 2.1 text-to-video"
            )
        if isinstance(values.get("patch_size"), list):
            values["patch_size"] = tuple(values["patch_size"])
        if values.get("out_channels") is None:
            values["out_channels"] = values.get("in_channels", 16)
        config = cls(**values)
        check_fields(config, "the transformer's config.json")
        if config.in_channels == 48:
            raise UserError(
                "in_channels = 48 in the transformer's config.json: this is Wan 2.2 TI2V-5B, whose "
                "latents come from another VAE; only Wan 2.1 text-to-video models are supported"
            )
        if config.in_channels != config.out_channels:
            raise UserError(
                f"in_channels = {config.in_channels} but out_channels = {config.out_channels} in "
                "the transformer's config.json: image-to-video models are not supported, only "
                "text-to-video ones, where both are equal"
            )
        return config


def quantizable(config: WanConfig) -> tuple[str, ...]:
    """Dotted names of every linear that QVGen quantizes; `blocks.` ones stand for all layers.

    Everything but the patch embedding: 306 linears in Wan-1.3B (method: Linear layers, all).
    """
    del config  # The list is the same for every size.
    attention = ("to_q", "to_k", "to_v", "to_out")
    return (
        *TIME_ONLY,
        *TEXT_ONLY[:2],
        *(f"blocks.attn1.{name}" for name in attention),
        *(f"blocks.attn2.{name}" for name in attention),
        "blocks.ffn.up",
        "blocks.ffn.down",
        "proj_out",
    )


def time_values(
    config: WanConfig, params: Mapping[str, Any], timesteps: jax.Array
) -> dict[str, jax.Array]:
    """What `TIME_OUTPUTS` say at `timesteps [entries]`, see `qvgen_jax.models.time_values`."""
    embedder = params["condition_embedder"]
    x = linear(
        embedder["time_embedder"]["linear_1"], timestep_embedding(timesteps, config.freq_dim)
    )
    embedding = linear(embedder["time_embedder"]["linear_2"], jax.nn.silu(x))
    modulation = linear(embedder["time_proj"], jax.nn.silu(embedding))
    return dict(zip(TIME_OUTPUTS, (embedding, modulation), strict=True))


class ConditionEmbedder(nnx.Module):
    """What the blocks need to know about the timestep and the prompt."""

    def __init__(self, config: WanConfig, *, key: jax.Array, dense: Callable, dtype: jnp.dtype):
        root, keys, dim = "condition_embedder", jax.random.split(key, 3), config.dim
        # The timestep's path has one row per sample: float32 costs nothing there.
        wide = wide_type(dtype)
        self.time_embedder = TwoLinears(
            f"{root}.time_embedder",
            (config.freq_dim, dim),
            jax.nn.silu,
            key=keys[0],
            dense=dense,
            dtype=wide,
        )
        self.time_proj = dense(f"{root}.time_proj", dim, 6 * dim, key=keys[1], dtype=wide)
        self.text_embedder = TwoLinears(
            f"{root}.text_embedder",
            (config.text_dim, dim),
            gelu,
            key=keys[2],
            dense=dense,
            dtype=dtype,
        )
        self.freq_dim = config.freq_dim

    def __call__(
        self, timesteps: jax.Array, text_embeds: jax.Array, ctx: QuantContext
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Embedding of the timestep `[b, dim]`, modulation `[b, 6, dim]`, text `[b, n, dim]`."""
        embedding = self.time_embedder(timestep_embedding(timesteps, self.freq_dim), ctx)
        modulation = self.time_proj(jax.nn.silu(embedding), ctx)
        modulation = modulation.reshape(modulation.shape[0], 6, -1)
        return embedding, modulation, self.text_embedder(text_embeds, ctx)


class WanTransformer(nnx.Module):
    """Predicts the velocity `noise - latents` of noisy latents.

    Args:
        key: PRNG key of the initial weights.
        dense: factory of the quantizable linears, with the signature of `Dense`.
        dtype: in which matrix products and activations are computed; parameters keep their own.
        clip_mode: how a timestep chooses its learned clip pair, see `quant.clips.clip_index`.
        buckets: how many pairs, or steps, it chooses from.
        remat: what the backward pass keeps, see `qvgen_jax.models.remat`. On CPU recomputing a
            block is faster too: the stacked activations are fresh pages at every step.
        time_entries: of a time table, see `quant.time_table`; its timesteps are then parameters,
            and each sample reads the entry nearest to its own.
        segments: where blocks differ in how their linears lie in memory, see `models.stack`.
    """

    def __init__(
        self,
        config: WanConfig,
        *,
        key: jax.Array,
        dense: Callable = Dense,
        dtype: jnp.dtype = jnp.float32,
        clip_mode: str = "bucket",
        buckets: int = 50,
        remat: str = "blocks",
        time_entries: int | None = None,
        segments: Segments = (),
    ):
        keys = jax.random.split(key, 5)
        dim, window = config.dim, config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.patch_embedding = Dense(
            "patch_embedding", window * config.in_channels, dim, key=keys[0], dtype=dtype
        )
        self.condition_embedder = ConditionEmbedder(config, key=keys[1], dense=dense, dtype=dtype)

        def make_block(key: jax.Array, dense: Callable) -> WanBlock:
            heads, hidden = config.num_attention_heads, config.ffn_dim
            return WanBlock(dim, heads, hidden, config.eps, key=key, dense=dense, dtype=dtype)

        layers = jax.random.split(keys[2], config.num_layers)
        self.blocks = build_blocks(make_block, layers, dense, segments)
        self.proj_out = dense(
            "proj_out", dim, window * config.out_channels, key=keys[3], dtype=dtype
        )
        table = jax.random.normal(keys[4], (1, 2, dim), jnp.float32) * dim**-0.5
        self.scale_shift_table = nnx.Param(table)
        self.config = config
        self.dtype = dtype
        self.clip_mode = clip_mode
        self.buckets = buckets
        self.remat = remat
        has_table = time_entries is not None
        self.timestep_table = (
            nnx.Param(jnp.zeros((time_entries,), jnp.float32)) if has_table else None
        )

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text_embeds: jax.Array,
        *,
        gate: jax.Array | None = None,
        clip_index: jax.Array | None = None,
    ) -> jax.Array:
        """Velocity of `latents [batch, frames, height, width, channels]`, same shape and dtype.

        Args:
            timesteps: `[batch]`, 0 (clean) to 1000 (noise).
            text_embeds: `[batch, text tokens, text_dim]`.
            gate: `[rank]`, weights of the low-rank branches; None where there are none.
            clip_index: int32 `[batch]`; chosen by the timesteps if None.

        Raises:
            UserError: frames, height or width do not fit the patches or the rotary table.
        """
        x, conditions = self.embed(
            latents, timesteps, text_embeds, gate=gate, clip_index=clip_index
        )
        x = self.run_blocks(x, conditions)
        return self.head(x, conditions).astype(latents.dtype)

    def embed(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text_embeds: jax.Array,
        *,
        gate: jax.Array | None = None,
        clip_index: jax.Array | None = None,
    ) -> tuple[jax.Array, WanConditions]:
        """What comes before the blocks: tokens `[batch, tokens, dim]`, padded over a mesh."""
        grid = self._grid(latents.shape)
        if clip_index is None:
            clip_index = clips.clip_index(timesteps, self.clip_mode, self.buckets)
        time_index = None
        if self.timestep_table is not None:
            time_index = nearest_entry(timesteps, self.timestep_table[...])
        ctx = QuantContext(clip_index, gate, time_index)
        x = self.patch_embedding(patchify(latents, self.config.patch_size))
        told = self.condition_embedder(timesteps, text_embeds, ctx)
        x = over_tokens(pad_tokens(x))
        return x, WanConditions(*told, ctx.padded(x, math.prod(grid)), grid)

    def run_blocks(self, x: jax.Array, conditions: WanConditions) -> jax.Array:
        """All blocks that this network has, on `x [batch, tokens, dim]`."""
        given, tokens = conditions, math.prod(conditions.grid)
        rotary = pad_table(rotary_table(given.grid, self.config.attention_head_dim), x.shape[1])

        def body(x: jax.Array, block: WanBlock) -> tuple[jax.Array, None]:
            y = block(x, given.text, given.modulation, rotary, tokens, given.ctx)
            return over_tokens(y), None

        return scan_blocks(recomputed(body, self.remat), x, self.blocks)

    def head(self, x: jax.Array, conditions: WanConditions) -> jax.Array:
        """What comes behind the blocks: `[batch, frames, height, width, channels]`."""
        config, grid = self.config, conditions.grid
        table = at_least_float32(self.scale_shift_table[...]) + conditions.embedding[:, None]
        shift, scale = jnp.split(table, 2, axis=1)
        last = Normalized(x, config.eps, self.dtype, scale=scale, shift=shift)
        (x,) = apply_normalized([self.proj_out], last, conditions.ctx)
        return unpatchify(x[:, : math.prod(grid)], grid, config.patch_size)

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        patch, limit = self.config.patch_size, self.config.rope_max_seq_len
        size = shape[1:4]
        grid = tuple(length // p for length, p in zip(size, patch, strict=True))
        if any(length % p for length, p in zip(size, patch, strict=True)) or max(grid) > limit:
            raise UserError(
                f"latents of {size} frames, height and width: each must be a multiple of the patch "
                f"{patch} and at most {limit} patches; choose another size"
            )
        return grid
