"""CogVideoX's causal 3-D VAE: video to latents and back, in the batches of frames it is defined by.

Follows diffusers' `AutoencoderKLCogVideoX`. Its group norms take their statistics over the frames
of a batch, so the batches (8 frames, 2 latent frames) belong to the model: another cut, or one pass
over the clip, gives other numbers. What does not divide goes into the first batch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.autoencoders.causal import Past, run_chunks
from qvgen_jax.autoencoders.cogvideox_layers import GroupNorm, LatentNorm, Level, Norm, conv3
from qvgen_jax.autoencoders.tiling import Tiling, run_tiles
from qvgen_jax.config_fields import MOST_LEVELS, Few, Positive, check_fields, refusal
from qvgen_jax.errors import UserError

# Frames of a batch (diffusers' num_sample_frames_batch_size, num_latent_frames_batch_size).
FRAMES, LATENT_FRAMES = 8, 2

_FILE = "the VAE's config.json"

# Fields that no published model sets and no pipeline of this family reads, and what they must be.
_PLAIN = {
    "act_fn": "silu",
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
}


@dataclasses.dataclass(frozen=True)
class CogVideoXVAEConfig:
    """The fields of the VAE's `config.json`, under their names there.

    `invert_scale_latents` says how the image-to-video pipeline scales its first frame; video
    latents are scaled alike in all models.
    """

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: Few = 3
    norm_eps: Positive = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: Positive = 1.15258426
    invert_scale_latents: bool = False

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "CogVideoXVAEConfig":
        """Reads a diffusers `config.json` as a dict.

        Raises:
            UserError: another class, fields that no published CogVideoX VAE sets, values that are
                not of their field's kind or range, or fields that contradict each other.
        """
        name = config.get("_class_name", "AutoencoderKLCogVideoX")
        if name != "AutoencoderKLCogVideoX":
            raise UserError(
                f"the VAE's _class_name is {name!r}; supported: 'AutoencoderKLCogVideoX'"
            )
        for field, plain in _PLAIN.items():
            if config.get(field, plain) != plain:
                raise UserError(
                    f"the VAE's config has {field} = {config[field]!r}; supported is the VAE of "
                    f"CogVideoX 2B, 5B and 1.5-5B, whose {field} is {plain!r}"
                )
        names = {field.name for field in dataclasses.fields(cls)}
        known = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
        parsed = cls(**known)
        check_fields(parsed, _FILE)
        parsed._check(config)
        return parsed

    def _check(self, config: Mapping[str, Any]) -> None:
        levels = len(self.block_out_channels)
        if not levels:
            raise refusal("block_out_channels", [], _FILE, "one number of channels or more")
        if levels > MOST_LEVELS:
            few = f"at most {MOST_LEVELS} numbers"
            raise refusal("block_out_channels", self.block_out_channels, _FILE, few)
        for way in ("down", "up"):
            expected = [f"CogVideoX{way.capitalize()}Block3D"] * levels
            blocks = config.get(f"{way}_block_types", expected)
            if blocks not in (expected, tuple(expected)):
                each = f"{expected[0]} for each of the {levels} block_out_channels"
                raise refusal(f"{way}_block_types", blocks, _FILE, each)
        groups, channels = self.norm_num_groups, list(self.block_out_channels)
        if any(n % groups for n in channels):
            divisor = f"a divisor of every one of block_out_channels {channels}"
            raise refusal("norm_num_groups", groups, _FILE, divisor)
        ratio = self.temporal_compression_ratio
        if ratio not in [2**n for n in range(levels)]:
            power = f"a power of two up to 2 ** {levels - 1}: there are {levels} block_out_channels"
            raise refusal("temporal_compression_ratio", ratio, _FILE, power)

    @property
    def temporal_factor(self) -> int:
        """Frames per latent frame, after the first of an odd number."""
        return self.temporal_compression_ratio

    @property
    def spatial_factor(self) -> int:
        """Pixels per latent pixel, along height and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def default_tiling(self) -> Tiling:
        """The tiles of diffusers' `enable_tiling()`: half a sample, overlaps of 1/6 and 1/5."""
        height, width = self.sample_height // 2, self.sample_width // 2
        return Tiling(
            height, width, stride_height=height - height // 6, stride_width=width - width // 5
        )

    def steps(self) -> list[bool | None]:
        """By level, from the outside: whether the step to the next one halves the frames too."""
        temporal = self.temporal_compression_ratio.bit_length() - 1
        return [i < temporal for i in range(len(self.block_out_channels) - 1)] + [None]


class Encoder(nnx.Module):
    """Video `[b, t, H, W, in]` to moments `[b, t', h, w, 2 z]`."""

    def __init__(self, config: CogVideoXVAEConfig, *, key: jax.Array, dtype: jnp.dtype):
        keys = iter(jax.random.split(key, 64))
        dims = config.block_out_channels
        norm = Norm(config.norm_num_groups, config.norm_eps, None)
        self.conv_in = conv3(config.in_channels, dims[0], key=next(keys), dtype=dtype)
        blocks = {}
        ins = [dims[0], *dims[:-1]]
        for i, (channels, out, step) in enumerate(zip(ins, dims, config.steps(), strict=True)):
            resnets = config.layers_per_block
            blocks[str(i)] = Level(
                channels, out, resnets, norm, key=next(keys), dtype=dtype, downsample=step
            )
        self.down_blocks = nnx.Dict(blocks)
        self.mid_block = Level(dims[-1], dims[-1], 2, norm, key=next(keys), dtype=dtype)
        self.norm_out = GroupNorm(dims[-1], config.norm_num_groups, eps=1e-6)
        self.conv_out = conv3(dims[-1], 2 * config.latent_channels, key=next(keys), dtype=dtype)

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.conv_in(x, past)
        for i in range(len(self.down_blocks)):
            x = self.down_blocks[str(i)](x, None, past)
        x = self.mid_block(x, None, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x)), past)


class Decoder(nnx.Module):
    """Latents `[b, t', h, w, z]` to video `[b, t, H, W, out]`."""

    def __init__(self, config: CogVideoXVAEConfig, *, key: jax.Array, dtype: jnp.dtype):
        keys = iter(jax.random.split(key, 64))
        dims = config.block_out_channels[::-1]
        z, groups = config.latent_channels, config.norm_num_groups
        norm = Norm(groups, config.norm_eps, z)
        self.conv_in = conv3(z, dims[0], key=next(keys), dtype=dtype)
        self.mid_block = Level(dims[0], dims[0], 2, norm, key=next(keys), dtype=dtype)
        blocks = {}
        ins = [dims[0], *dims[:-1]]
        # Frames are doubled first: the levels' steps in the encoder's order, not reversed.
        for i, (channels, out, step) in enumerate(zip(ins, dims, config.steps(), strict=True)):
            resnets = config.layers_per_block + 1
            blocks[str(i)] = Level(
                channels, out, resnets, norm, key=next(keys), dtype=dtype, upsample=step
            )
        self.up_blocks = nnx.Dict(blocks)
        self.norm_out = LatentNorm(dims[-1], groups, z, key=next(keys), dtype=dtype)
        self.conv_out = conv3(dims[-1], config.out_channels, key=next(keys), dtype=dtype)

    def __call__(self, latents: jax.Array, past: Past) -> jax.Array:
        x = self.mid_block(self.conv_in(latents, past), latents, past)
        for i in range(len(self.up_blocks)):
            x = self.up_blocks[str(i)](x, latents, past)
        return self.conv_out(jax.nn.silu(self.norm_out(x, latents)), past)


class CogVideoXVAE(nnx.Module):
    """The autoencoder. Parameters are float32 or as loaded; convolutions compute in `dtype`."""

    def __init__(
        self, config: CogVideoXVAEConfig, *, key: jax.Array, dtype: jnp.dtype = jnp.float32
    ):
        k1, k2 = jax.random.split(key)
        self.encoder = Encoder(config, key=k1, dtype=dtype)
        self.decoder = Decoder(config, key=k2, dtype=dtype)
        self.config = config

    def encode(self, video: jax.Array, tiling: Tiling | None = None) -> tuple[jax.Array, jax.Array]:
        """Encodes eight frames at a time, eight to fifteen at first.

        Args:
            video: `[b, t, H, W, 3]` in [-1, 1]; H and W multiples of the spatial factor. From
                `decode` as many frames come back if `t` is 8n or 8n + 1, else more.
            tiling: encodes tile by tile and blends; a video no larger than a tile is left whole.

        Returns:
            Mean and log-variance, float32 `[b, ceil(t / 4), H/8, W/8, z]`, not normalised.

        Raises:
            UserError: a size or tiles that do not divide.
        """
        _, _, height, width, _ = video.shape
        space = self.config.spatial_factor
        if height % space or width % space:
            raise UserError(
                f"a video of {height} x {width} cannot be encoded: height and width must be "
                f"multiples of {space}; cut or resize it"
            )

        def run(x: jax.Array) -> jax.Array:
            return run_chunks(self.encoder, x, _first(x.shape[1], FRAMES), FRAMES)

        if tiling is None:
            moments = run(video)
        else:
            moments = run_tiles(run, video, tiling, tiling.divided(space))
        mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array, tiling: Tiling | None = None) -> jax.Array:
        """Decodes two latent frames at a time, three at first if their number is odd.

        Args:
            latents: `[b, t, h, w, z]`, not normalised.
            tiling: decodes tile by tile and blends; latents no larger than a tile are left whole.

        Returns:
            Video float32 `[b, 4t, 8h, 8w, 3]`, of odd `t` three frames fewer; clipped to [-1, 1],
            as diffusers' pipeline does after its `decode`.

        Raises:
            UserError: tiles that the spatial factor does not divide.
        """

        def run(x: jax.Array) -> jax.Array:
            return run_chunks(self.decoder, x, _first(x.shape[1], LATENT_FRAMES), LATENT_FRAMES)

        if tiling is None:
            video = run(latents)
        else:
            video = run_tiles(run, latents, tiling.divided(self.config.spatial_factor), tiling)
        return jnp.clip(video.astype(jnp.float32), -1.0, 1.0)


def _first(frames: int, batch: int) -> int:
    """How many frames the first batch has."""
    return min(frames, batch + frames % batch)


def normalize(
    config: CogVideoXVAEConfig, mean: jax.Array, logvar: jax.Array | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Latents as the transformer sees them: `mean * scaling_factor`.

    With `logvar`, also the log-variance of the normalised latents.
    """
    scaled = mean * jnp.float32(config.scaling_factor)
    if logvar is None:
        return scaled
    return scaled, logvar + 2 * jnp.log(jnp.float32(config.scaling_factor))


def denormalize(config: CogVideoXVAEConfig, latents: jax.Array) -> jax.Array:
    """The inverse of `normalize` for latents: what `decode` takes."""
    return latents / jnp.float32(config.scaling_factor)
