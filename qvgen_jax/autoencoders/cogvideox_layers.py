"""Layers of CogVideoX's causal video VAE.

Follows diffusers' `autoencoder_kl_cogvideox.py`, `CogVideoXDownsample3D` and `CogVideoXUpsample3D`.
Frames are `[batch, frames, height, width, channels]`. An odd number of frames is a clip's start:
its first frame is neither averaged with a neighbour nor doubled.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.autoencoders.causal import CausalConv, Conv2d, Past


@dataclasses.dataclass(frozen=True)
class Norm:
    """How the blocks of one network normalise.

    Attributes:
        groups: of channels.
        eps: of the group norms that are not conditioned.
        latent_channels: of the latents that modulate the normalised values; None in the encoder.
    """

    groups: int
    eps: float
    latent_channels: int | None

    def build(self, channels: int, *, key: jax.Array, dtype: jnp.dtype) -> "GroupNorm | LatentNorm":
        """One norm layer over `channels`."""
        if self.latent_channels is None:
            return GroupNorm(channels, self.groups, eps=self.eps)
        return LatentNorm(channels, self.groups, self.latent_channels, key=key, dtype=dtype)


def conv3(in_channels: int, out_channels: int, *, key: jax.Array, dtype: jnp.dtype) -> CausalConv:
    """The causal 3 x 3 x 3 convolution, which repeats the clip's first frame before it."""
    window = (3, 3, 3)
    return CausalConv(in_channels, out_channels, window, key=key, dtype=dtype, repeat_first=True)


class GroupNorm(nnx.Module):
    """Group norm over frames and pixels with `scale`, `bias` `[channels]`; computed in float32.

    The statistics are of the frames it is given: how a clip is cut into chunks changes the result.
    """

    def __init__(self, channels: int, groups: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.groups, self.eps = groups, eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32).reshape(*x.shape[:4], self.groups, -1)
        mean = y.mean((1, 2, 3, 5), keepdims=True)
        variance = jnp.square(y - mean).mean((1, 2, 3, 5), keepdims=True)
        y = ((y - mean) * jax.lax.rsqrt(variance + self.eps)).reshape(x.shape)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)


class LatentNorm(nnx.Module):
    """Group norm whose result is scaled and shifted, pixel by pixel, by projections of the latents.

    `CogVideoXSpatialNorm3D`. The projections are of single pixels, so they come before the latents
    are enlarged to the size of `x`.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        latent_channels: int,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
    ):
        k1, k2 = jax.random.split(key)
        self.norm_layer = GroupNorm(channels, groups, eps=1e-6)
        self.conv_y = CausalConv(latent_channels, channels, (1, 1, 1), key=k1, dtype=dtype)
        self.conv_b = CausalConv(latent_channels, channels, (1, 1, 1), key=k2, dtype=dtype)

    def __call__(self, x: jax.Array, latents: jax.Array) -> jax.Array:
        scale = enlarge(self.conv_y(latents, Past()), x.shape[1:4])
        shift = enlarge(self.conv_b(latents, Past()), x.shape[1:4])
        return self.norm_layer(x) * scale + shift


def enlarge(x: jax.Array, size: tuple[int, int, int]) -> jax.Array:
    """Nearest neighbours of `[b, t, h, w, c]` at whole multiples `size = (t', h', w')`.

    Of an odd number of frames the first stays one: `t = 1 + n` to `t' = 1 + n k`.
    """
    frames, height, width = size
    alone = frames % 2
    if frames != x.shape[1]:
        times = (frames - alone) // (x.shape[1] - alone)
        x = jnp.concatenate([x[:, :alone], jnp.repeat(x[:, alone:], times, axis=1)], axis=1)
    x = jnp.repeat(x, height // x.shape[2], axis=2)
    return jnp.repeat(x, width // x.shape[3], axis=3)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, causal convolution, twice, beside a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        norm: Norm,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
    ):
        k1, k2, k3, k4, k5 = jax.random.split(key, 5)
        self.norm1 = norm.build(in_channels, key=k1, dtype=dtype)
        self.conv1 = conv3(in_channels, out_channels, key=k2, dtype=dtype)
        self.norm2 = norm.build(out_channels, key=k3, dtype=dtype)
        self.conv2 = conv3(out_channels, out_channels, key=k4, dtype=dtype)
        self.conv_shortcut = (
            CausalConv(in_channels, out_channels, (1, 1, 1), key=k5, dtype=dtype)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: jax.Array, latents: jax.Array | None, past: Past) -> jax.Array:
        condition = () if latents is None else (latents,)
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, past)
        x = self.conv1(jax.nn.silu(self.norm1(x, *condition)), past)
        x = self.conv2(jax.nn.silu(self.norm2(x, *condition)), past)
        return x + shortcut


class Downsample(nnx.Module):
    """Halves height and width; with `temporal`, first averages pairs of frames."""

    def __init__(self, channels: int, temporal: bool, *, key: jax.Array, dtype: jnp.dtype):
        self.conv = Conv2d(channels, channels, 3, key=key, dtype=dtype, stride=2, padding=(0, 1))
        self.temporal = temporal

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.temporal:
            alone = x.shape[1] % 2
            pairs = (x[:, alone::2] + x[:, alone + 1 :: 2]) / 2
            x = jnp.concatenate([x[:, :alone], pairs], axis=1)
        return self.conv(x)


class Upsample(nnx.Module):
    """Doubles height and width, with `temporal` also frames, then convolves within frames."""

    def __init__(self, channels: int, temporal: bool, *, key: jax.Array, dtype: jnp.dtype):
        self.conv = Conv2d(channels, channels, 3, key=key, dtype=dtype)
        self.temporal = temporal

    def __call__(self, x: jax.Array) -> jax.Array:
        _, frames, height, width, _ = x.shape
        if self.temporal:
            frames = 2 * frames - frames % 2
        return self.conv(enlarge(x, (frames, 2 * height, 2 * width)))


class Level(nnx.Module):
    """Residual blocks of one resolution, then (but in the last level) the step to the next.

    Serves as `CogVideoXDownBlock3D`, `CogVideoXMidBlock3D` and `CogVideoXUpBlock3D`. `downsample`
    and `upsample` are None for no such step, else whether it changes the frames as well.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        resnets: int,
        norm: Norm,
        *,
        key: jax.Array,
        dtype: jnp.dtype,
        downsample: bool | None = None,
        upsample: bool | None = None,
    ):
        *keys, last = jax.random.split(key, resnets + 1)
        ins = [channels] + [out_channels] * (resnets - 1)
        self.resnets = nnx.Dict(
            {
                str(i): ResidualBlock(n, out_channels, norm, key=k, dtype=dtype)
                for i, (n, k) in enumerate(zip(ins, keys, strict=True))
            }
        )
        self.downsamplers = (
            nnx.Dict({"0": Downsample(out_channels, downsample, key=last, dtype=dtype)})
            if downsample is not None
            else None
        )
        self.upsamplers = (
            nnx.Dict({"0": Upsample(out_channels, upsample, key=last, dtype=dtype)})
            if upsample is not None
            else None
        )

    def __call__(self, x: jax.Array, latents: jax.Array | None, past: Past) -> jax.Array:
        for i in range(len(self.resnets)):
            x = self.resnets[str(i)](x, latents, past)
        for step in (self.downsamplers, self.upsamplers):
            x = x if step is None else step["0"](x)
        return x
