"""Wan 2.1's causal 3-D VAE: video to latents and back, whole or chunk by chunk.

Follows diffusers' `AutoencoderKLWan`. The first frame is coded alone, then every group of four
(the temporal factor) becomes one latent frame: 1 + 4n frames to 1 + n latent frames.
"""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.autoencoders.causal import CausalConv, Past, run_chunks
from qvgen_jax.autoencoders.tiling import Tiling, run_tiles
from qvgen_jax.autoencoders.wan_layers import (
    Downsample,
    FrameAttention,
    ResidualBlock,
    RMSNorm,
    Upsample,
)
from qvgen_jax.config_fields import MOST_LEVELS, Few, Positive, check_fields, refusal
from qvgen_jax.errors import UserError

_FILE = "the VAE's config.json"


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
    """The fields of the VAE's `config.json`, under their names there."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: Few = 2
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: tuple[float, ...] = (0.0,) * 16
    latents_std: tuple[Positive, ...] = (1.0,) * 16

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "WanVAEConfig":
        """Reads a diffusers `config.json` as a dict.

        Raises:
            UserError: another class, a Wan 2.2 (residual, patched) VAE, attention in the encoder's
                levels, values that are not of their field's kind or range, or fields that
                contradict each other.
        """
        name = config.get("_class_name", "AutoencoderKLWan")
        if name != "AutoencoderKLWan":
            raise UserError(f"the VAE's _class_name is {name!r}; supported: 'AutoencoderKLWan'")
        for field, plain in (("is_residual", False), ("patch_size", None), ("attn_scales", [])):
            if config.get(field) not in (plain, None, ()):
                raise UserError(
                    f"the VAE's config has {field} = {config[field]!r}; only Wan 2.1's VAE is "
                    f"supported ({field} = {plain!r}), not the one of Wan 2.2 TI2V-5B"
                )
        names = {field.name for field in dataclasses.fields(cls)}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
        parsed = cls(**known)
        check_fields(parsed, _FILE)
        parsed._check()
        return parsed

    def _check(self) -> None:
        if len(self.dim_mult) > MOST_LEVELS:
            raise refusal("dim_mult", self.dim_mult, _FILE, f"at most {MOST_LEVELS} values")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            fewer = f"one value fewer than the {len(self.dim_mult)} of dim_mult"
            raise refusal("temperal_downsample", self.temperal_downsample, _FILE, fewer)
        for field in ("latents_mean", "latents_std"):
            values = getattr(self, field)
            if len(values) != self.z_dim:
                raise refusal(field, values, _FILE, f"as many values as z_dim = {self.z_dim}")

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.temperal_downsample)

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def default_tiling(self) -> Tiling:
        """The tiles of diffusers' `enable_tiling()`."""
        return Tiling(256, 256, stride_height=192, stride_width=192)


class MidBlock(nnx.Module):
    """Residual block, attention within frames, residual block."""

    def __init__(self, channels: int, *, key: jax.Array, dtype: jnp.dtype):
        k1, k2, k3 = jax.random.split(key, 3)
        first = ResidualBlock(channels, channels, key=k1, dtype=dtype)
        second = ResidualBlock(channels, channels, key=k2, dtype=dtype)
        self.resnets = nnx.Dict({"0": first, "1": second})
        self.attentions = nnx.Dict({"0": FrameAttention(channels, key=k3, dtype=dtype)})

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.attentions["0"](self.resnets["0"](x, past))
        return self.resnets["1"](x, past)


class Encoder(nnx.Module):
    """Video `[b, t, H, W, in]` to moments `[b, t', h, w, 2 z]`, before `quant_conv`."""

    def __init__(self, config: WanVAEConfig, *, key: jax.Array, dtype: jnp.dtype):
        keys = iter(jax.random.split(key, 64))
        dims = [config.base_dim * m for m in (1, *config.dim_mult)]
        window = (3, 3, 3)
        self.conv_in = CausalConv(config.in_channels, dims[0], window, key=next(keys), dtype=dtype)
        blocks: list[nnx.Module] = []
        for level, (channels, out) in enumerate(itertools.pairwise(dims)):
            for _ in range(config.num_res_blocks):
                blocks.append(ResidualBlock(channels, out, key=next(keys), dtype=dtype))
                channels = out
            if level < len(config.temperal_downsample):
                temporal = config.temperal_downsample[level]
                blocks.append(Downsample(out, temporal, key=next(keys), dtype=dtype))
        self.down_blocks = nnx.Dict({str(i): block for i, block in enumerate(blocks)})
        self.mid_block = MidBlock(dims[-1], key=next(keys), dtype=dtype)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv(dims[-1], 2 * config.z_dim, window, key=next(keys), dtype=dtype)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.conv_in(x, past)
        for i in range(len(self.down_blocks)):
            x = self.down_blocks[str(i)](x, past)
        x = self.mid_block(x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class UpBlock(nnx.Module):
    """Residual blocks, then (but in the last level) an upsampler that halves the channels."""

    def __init__(
        self,
        channels: int,
        out_channels: int,
        resnets: int,
        temporal: bool | None,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
    ):
        *keys, last = jax.random.split(key, resnets + 1)
        ins = [channels] + [out_channels] * (resnets - 1)
        self.resnets = nnx.Dict(
            {
                str(i): ResidualBlock(n, out_channels, key=k, dtype=dtype)
                for i, (n, k) in enumerate(zip(ins, keys, strict=True))
            }
        )
        self.upsamplers = (
            nnx.Dict({"0": Upsample(out_channels, temporal, key=last, dtype=dtype)})
            if temporal is not None
            else None
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        for i in range(len(self.resnets)):
            x = self.resnets[str(i)](x, past)
        return x if self.upsamplers is None else self.upsamplers["0"](x, past)


class Decoder(nnx.Module):
    """Latents `[b, t', h, w, z]`, after `post_quant_conv`, to video `[b, t, H, W, out]`."""

    def __init__(self, config: WanVAEConfig, *, key: jax.Array, dtype: jnp.dtype):
        keys = iter(jax.random.split(key, 64))
        base = config.decoder_base_dim or config.base_dim
        dims = [base * m for m in (config.dim_mult[-1], *reversed(config.dim_mult))]
        upsamples = [*reversed(config.temperal_downsample), None]
        window = (3, 3, 3)
        self.conv_in = CausalConv(config.z_dim, dims[0], window, key=next(keys), dtype=dtype)
        self.mid_block = MidBlock(dims[0], key=next(keys), dtype=dtype)
        blocks = {}
        for i, temporal in enumerate(upsamples):
            channels = dims[i] // 2 if i else dims[0]
            blocks[str(i)] = UpBlock(
                channels,
                dims[i + 1],
                config.num_res_blocks + 1,
                temporal,
                key=next(keys),
                dtype=dtype,
            )
        self.up_blocks = nnx.Dict(blocks)
        self.norm_out = RMSNorm(dims[-1])
        self.conv_out = CausalConv(
            dims[-1], config.out_channels, window, key=next(keys), dtype=dtype
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.mid_block(self.conv_in(x, past), past)
        for i in range(len(self.up_blocks)):
            x = self.up_blocks[str(i)](x, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class WanVAE(nnx.Module):
    """The autoencoder. Parameters are float32 or as loaded; convolutions compute in `dtype`."""

    def __init__(self, config: WanVAEConfig, *, key: jax.Array, dtype: jnp.dtype = jnp.float32):
        k1, k2, k3, k4 = jax.random.split(key, 4)
        z, point = config.z_dim, (1, 1, 1)
        self.encoder = Encoder(config, key=k1, dtype=dtype)
        self.quant_conv = CausalConv(2 * z, 2 * z, point, key=k2, dtype=dtype)
        self.post_quant_conv = CausalConv(z, z, point, key=k3, dtype=dtype)
        self.decoder = Decoder(config, key=k4, dtype=dtype)
        self.config = config

    def encode(self, video: jax.Array, tiling: Tiling | None = None) -> tuple[jax.Array, jax.Array]:
        """Encodes one frame, then chunks of the temporal factor: memory does not grow with time.

        Args:
            video: `[b, 1 + 4n, H, W, 3]` in [-1, 1]; H and W multiples of the spatial factor.
            tiling: encodes tile by tile and blends; a video no larger than a tile is left whole.

        Returns:
            Mean and log-variance, float32 `[b, 1 + n, H/8, W/8, z]`, not normalised.

        Raises:
            UserError: frames, a size or tiles that do not divide.
        """
        self._check_video(video)
        factor = self.config.temporal_factor

        def run(x: jax.Array) -> jax.Array:
            return run_chunks(self.encoder, x, 1, factor)

        if tiling is None:
            return self._moments(run(video))
        latent_tiling = tiling.divided(self.config.spatial_factor)
        return self._moments(run_tiles(run, video, tiling, latent_tiling))

    def encode_whole(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`encode` in one pass, for training: the same result, memory grows with the clip."""
        self._check_video(video)
        return self._moments(self.encoder(video, Past()))

    def decode(self, latents: jax.Array, tiling: Tiling | None = None) -> jax.Array:
        """Decodes one latent frame at a time.

        Args:
            latents: `[b, 1 + n, h, w, z]`, not normalised.
            tiling: decodes tile by tile and blends; latents no larger than a tile are left whole.

        Returns:
            Video `[b, 1 + 4n, 8h, 8w, 3]` float32, clipped to [-1, 1].

        Raises:
            UserError: tiles that the spatial factor does not divide.
        """
        x = self.post_quant_conv(latents, Past())

        def run(x: jax.Array) -> jax.Array:
            return run_chunks(self.decoder, x, 1, 1)

        if tiling is None:
            video = run(x)
        else:
            video = run_tiles(run, x, tiling.divided(self.config.spatial_factor), tiling)
        return jnp.clip(video.astype(jnp.float32), -1.0, 1.0)

    def decode_whole(self, latents: jax.Array) -> jax.Array:
        """`decode` in one pass and not clipped, so that a training loss keeps its gradient."""
        x = self.post_quant_conv(latents, Past())
        return self.decoder(x, Past()).astype(jnp.float32)

    def _moments(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, logvar = jnp.split(self.quant_conv(x, Past()).astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def _check_video(self, video: jax.Array) -> None:
        _, frames, height, width, _ = video.shape
        time, space = self.config.temporal_factor, self.config.spatial_factor
        if (frames - 1) % time or height % space or width % space:
            raise UserError(
                f"a video of {frames} frames of {height} x {width} cannot be encoded: frames must "
                f"be 1 + a multiple of {time}, height and width multiples of {space}; cut or "
                "resize it"
            )


def normalize(
    config: WanVAEConfig, mean: jax.Array, logvar: jax.Array | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Latents as the transformer sees them: `(mean - latents_mean) / latents_std` per channel.

    With `logvar`, also the log-variance of the normalised latents.
    """
    center = jnp.asarray(config.latents_mean, jnp.float32)
    std = jnp.asarray(config.latents_std, jnp.float32)
    scaled = (mean - center) / std
    return scaled if logvar is None else (scaled, logvar - 2 * jnp.log(std))


def denormalize(config: WanVAEConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `normalize` for latents: what `decode` takes."""
    center = jnp.asarray(config.latents_mean, jnp.float32)
    return latents * jnp.asarray(config.latents_std, jnp.float32) + center
