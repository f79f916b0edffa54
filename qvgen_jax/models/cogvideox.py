"""The CogVideoX text-to-video transformers (diffusers, `cogvideox_transformer_3d.py`).

Three of them: the 2B adds sin-cos positions, the 5B rotates by positions, and 1.5-5B rotates and
has patches of two frames. Channels last.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.reference import wide_type
from qvgen_jax.errors import UserError
from qvgen_jax.models.cogvideox_block import CogVideoXBlock, CogVideoXConditions
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.cogvideox_positions import rotations, sincos_table
from qvgen_jax.models.layers import (
    LayerNorm,
    TwoLinears,
    linear,
    patchify,
    timestep_embedding,
    unpatchify,
)
from qvgen_jax.models.remat import recomputed
from qvgen_jax.models.rope import pad_table
from qvgen_jax.models.stack import Segments, build_blocks, scan_blocks
from qvgen_jax.quant import clips
from qvgen_jax.quant.dense import Dense, QuantContext
from qvgen_jax.quant.time_table import nearest_entry
from qvgen_jax.sharding import over_tokens, pad_tokens

TEXT_ONLY = ("patch_embed.text_proj",)
"""Linears that see only the prompt: nothing in them depends on the timestep."""

TIME_ONLY = (
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "blocks.norm1.linear",
    "blocks.norm2.linear",
    "norm_out.linear",
)
"""Linears that see only the timestep."""

TIME_OUTPUTS = TIME_ONLY[2:]
"""Those of them that others read."""

VALUES_OF = {"blocks.attn1.to_out": "blocks.attn1.to_v"}
"""Linears that see attention's outputs, and those that make its values.

Attention mixes tokens, head by head: a map of channels within heads may come before or after it.
"""


AFTER_BLOCKS = ("norm_out.linear", "proj_out")
"""Linears behind the last block."""


def quantizable(config: CogVideoXConfig) -> tuple[str, ...]:
    """Dotted names of every linear that QVGen quantizes; `blocks.` ones stand for all layers.

    Everything but a convolution over patches: 245 linears in CogVideoX-2B (method: Linear layers,
    all).
    """
    return (
        *(("patch_embed.proj",) if config.unfolds_patches else ()),
        *TEXT_ONLY,
        *TIME_ONLY,
        *(f"blocks.attn1.{name}" for name in ("to_q", "to_k", "to_v", "to_out")),
        "blocks.ffn.up",
        "blocks.ffn.down",
        "proj_out",
    )


def time_values(
    config: CogVideoXConfig, params: Mapping[str, Any], timesteps: jax.Array
) -> dict[str, jax.Array]:
    """What `TIME_OUTPUTS` say at `timesteps [entries]`, see `qvgen_jax.models.time_values`."""
    embedder, blocks = params["time_embedding"], params["blocks"]
    x = linear(embedder["linear_1"], timestep_embedding(timesteps, config.dim))
    condition = jax.nn.silu(linear(embedder["linear_2"], jax.nn.silu(x)))
    in_every_block = jax.vmap(linear, in_axes=(0, None))
    values = (
        in_every_block(blocks["norm1"]["linear"], condition),
        in_every_block(blocks["norm2"]["linear"], condition),
        linear(params["norm_out"]["linear"], condition),
    )
    return dict(zip(TIME_OUTPUTS, values, strict=True))


class PatchEmbed(nnx.Module):
    """Tokens of the prompt and of the video."""

    def __init__(
        self, config: CogVideoXConfig, *, key: jax.Array, dense: Callable, dtype: jnp.dtype
    ):
        keys = jax.random.split(key)
        patch, dim = config.patch_size, config.dim
        project = dense if config.unfolds_patches else Dense
        self.proj = project(
            "patch_embed.proj",
            patch[0] * patch[1] * patch[2] * config.in_channels,
            dim,
            key=keys[0],
            dtype=dtype,
        )
        self.text_proj = dense(
            "patch_embed.text_proj", config.text_embed_dim, dim, key=keys[1], dtype=dtype
        )
        self.patch_size = patch

    def __call__(
        self, latents: jax.Array, text_embeds: jax.Array, ctx: QuantContext
    ) -> tuple[jax.Array, jax.Array]:
        """`[b, text tokens, dim]` and `[b, tokens, dim]`."""
        patches = patchify(latents, self.patch_size, channels_first=True)
        return self.text_proj(text_embeds, ctx), self.proj(patches, ctx)


class OutputNorm(nnx.Module):
    """diffusers' `AdaLayerNorm` with the order shift, scale.

    Not left to `proj_out`'s quantizer: it follows another norm, whose float32 result would have to
    be written to memory for it.
    """

    def __init__(
        self, config: CogVideoXConfig, *, key: jax.Array, dense: Callable, dtype: jnp.dtype
    ):
        features = (config.time_embed_dim, 2 * config.dim)
        self.linear = dense("norm_out.linear", *features, key=key, dtype=wide_type(dtype))
        self.norm = LayerNorm(config.dim, eps=config.norm_eps)

    def __call__(self, x: jax.Array, condition: jax.Array, ctx: QuantContext) -> jax.Array:
        """Float32 `[b, tokens, dim]` of `x`; `condition [b, time_dim]`."""
        shift, scale = jnp.split(self.linear(condition, ctx)[:, None], 2, axis=-1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer(nnx.Module):
    """Predicts v of noisy latents: `sqrt(alpha_bar) * noise - sqrt(1 - alpha_bar) * latents`.

    Args:
        key: PRNG key of the initial weights.
        dense: factory of the quantizable linears, with the signature of `Dense`.
        dtype: in which matrix products and activations are computed; parameters keep their own.
        clip_mode: how a timestep chooses its learned clip pair, see `quant.clips.clip_index`.
        buckets: how many pairs, or steps, it chooses from.
        remat: what the backward pass keeps, see `qvgen_jax.models.remat`.
        time_entries: of a time table, see `quant.time_table`; its timesteps are then parameters,
            and each sample reads the entry nearest to its own.
        segments: where blocks differ in how their linears lie in memory, see `models.stack`.
    """

    def __init__(
        self,
        config: CogVideoXConfig,
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
        dim, time_dim = config.dim, config.time_embed_dim
        self.patch_embed = PatchEmbed(config, key=keys[0], dense=dense, dtype=dtype)
        # The timestep's path has one row per sample: float32 costs nothing there.
        self.time_embedding = TwoLinears(
            "time_embedding",
            (dim, time_dim),
            jax.nn.silu,
            key=keys[1],
            dense=dense,
            dtype=wide_type(dtype),
        )

        def make_block(key: jax.Array, dense: Callable) -> CogVideoXBlock:
            sizes = (dim, config.num_attention_heads, time_dim, config.norm_eps)
            return CogVideoXBlock(*sizes, key=key, dense=dense, dtype=dtype)

        layers = jax.random.split(keys[2], config.num_layers)
        self.blocks = build_blocks(make_block, layers, dense, segments)
        self.norm_final = LayerNorm(dim, eps=config.norm_eps)
        self.norm_out = OutputNorm(config, key=keys[3], dense=dense, dtype=dtype)
        patch = config.patch_size
        features = patch[0] * patch[1] * patch[2] * config.out_channels
        self.proj_out = dense("proj_out", dim, features, key=keys[4], dtype=dtype)
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
        """v of `latents [batch, frames, height, width, channels]`, same shape and dtype.

        Args:
            timesteps: `[batch]`, 0 to 999.
            text_embeds: `[batch, text tokens, text_embed_dim]`; padding is attended in CogVideoX.
            gate: `[rank]`, weights of the low-rank branches; None where there are none.
            clip_index: int32 `[batch]`; chosen by the timesteps if None.

        Raises:
            UserError: frames, height or width do not fit the patches.
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
    ) -> tuple[jax.Array, CogVideoXConditions]:
        """What comes before the blocks: text and video `[batch, tokens, dim]`, padded on a mesh."""
        grid = self._grid(latents.shape)
        if clip_index is None:
            clip_index = clips.clip_index(timesteps, self.clip_mode, self.buckets)
        time_index = None
        if self.timestep_table is not None:
            time_index = nearest_entry(timesteps, self.timestep_table[...])
        ctx = QuantContext(clip_index, gate, time_index)
        embedding = self.time_embedding(timestep_embedding(timesteps, self.config.dim), ctx)
        text, video = self.patch_embed(latents, text_embeds, ctx)
        x = jnp.concatenate([text, self._placed(video, grid)], axis=1)
        tokens, x = x.shape[1], over_tokens(pad_tokens(x))
        told = (jax.nn.silu(embedding), ctx.padded(x, tokens))
        return x, CogVideoXConditions(*told, grid, text.shape[1])

    def run_blocks(self, x: jax.Array, conditions: CogVideoXConditions) -> jax.Array:
        """All blocks that this network has, on `x [batch, tokens, dim]`."""
        given = conditions
        rotary = pad_table(self._rotations(given.grid, given.text_tokens), x.shape[1])

        def body(x: jax.Array, block: CogVideoXBlock) -> tuple[jax.Array, None]:
            y = block(x, given.condition, given.text_tokens, rotary, given.tokens, given.ctx)
            return over_tokens(y), None

        return scan_blocks(recomputed(body, self.remat), x, self.blocks)

    def head(self, x: jax.Array, conditions: CogVideoXConditions) -> jax.Array:
        """What comes behind the blocks: `[batch, frames, height, width, channels]`."""
        given, ctx = conditions, conditions.ctx.unpadded()
        x = self.norm_final(x[:, given.text_tokens : given.tokens])
        x = self.norm_out(x, given.condition, ctx)
        x = self.proj_out(x.astype(self.dtype), ctx)
        return unpatchify(x, given.grid, self.config.patch_size, channels_first=True)

    def _placed(self, video: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
        """The video's tokens, with their positions in them if the model adds them."""
        config = self.config
        if config.use_rotary_positional_embeddings:
            return video
        scales = (config.spatial_interpolation_scale, config.temporal_interpolation_scale)
        return (video + sincos_table(grid, config.dim, *scales)).astype(self.dtype)

    def _rotations(self, grid: tuple[int, int, int], text_tokens: int) -> tuple | None:
        """The table that turns queries and keys, if the model does."""
        config = self.config
        if not config.use_rotary_positional_embeddings:
            return None
        _, height, width = config.patch_size
        trained_at = (config.sample_height // height, config.sample_width // width)
        base = None if config.unfolds_patches else trained_at
        return rotations(grid, config.attention_head_dim, base, text_tokens)

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        patch, size = self.config.patch_size, shape[1:4]
        if any(length % p for length, p in zip(size, patch, strict=True)):
            raise UserError(
                f"latents of {size} frames, height and width: each must be a multiple of the patch "
                f"{patch}; choose another size, or add extra_frames({size[0]}) frames in front"
            )
        return tuple(length // p for length, p in zip(size, patch, strict=True))
