"""Layers of Wan's causal video VAE.

Follows diffusers' `autoencoder_kl_wan.py`. Frames are `[batch, frames, height, width, channels]`.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.autoencoders.causal import CausalConv, Conv2d, Past


class RMSNorm(nnx.Module):
    """Unit mean square over channels, times `gamma [channels]`; computed in float32."""

    def __init__(self, channels: int):
        self.gamma = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        # The floor is PyTorch's on the norm (1e-12), squared; its gradient is finite at zero.
        squared = jnp.maximum(jnp.sum(y * y, axis=-1, keepdims=True), 1e-24)
        y = y * (jax.lax.rsqrt(squared) * y.shape[-1] ** 0.5) * self.gamma[...]
        return y.astype(x.dtype)


class ResidualBlock(nnx.Module):
    """Norm, SiLU, causal convolution, twice, beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, *, key: jax.Array, dtype: jnp.dtype):
        k1, k2, k3 = jax.random.split(key, 3)
        window = (3, 3, 3)
        self.norm1 = RMSNorm(in_channels)
        self.conv1 = CausalConv(in_channels, out_channels, window, key=k1, dtype=dtype)
        self.norm2 = RMSNorm(out_channels)
        self.conv2 = CausalConv(out_channels, out_channels, window, key=k2, dtype=dtype)
        self.conv_shortcut = (
            CausalConv(in_channels, out_channels, (1, 1, 1), key=k3, dtype=dtype)
            if in_channels != out_channels
            else None
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        shortcut = x if self.conv_shortcut is None else self.conv_shortcut(x, past)
        x = self.conv1(jax.nn.silu(self.norm1(x)), past)
        x = self.conv2(jax.nn.silu(self.norm2(x)), past)
        return x + shortcut


class FrameAttention(nnx.Module):
    """One head of self-attention over the pixels of each frame."""

    def __init__(self, channels: int, *, key: jax.Array, dtype: jnp.dtype):
        k1, k2 = jax.random.split(key)
        self.norm = RMSNorm(channels)
        self.to_qkv = Conv2d(channels, 3 * channels, 1, key=k1, dtype=dtype)
        self.proj = Conv2d(channels, channels, 1, key=k2, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        b, t, height, width, channels = x.shape
        qkv = self.to_qkv(self.norm(x)).reshape(b, t, height * width, 3 * channels)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        scores = jnp.einsum("btqc,btkc->btqk", q, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(v.dtype)
        y = jnp.einsum("btqk,btkc->btqc", weights, v, preferred_element_type=jnp.float32)
        return x + self.proj(y.astype(x.dtype).reshape(x.shape))


class Downsample(nnx.Module):
    """Halves height and width; with `temporal`, also the frames after the first.

    The clip's first frame skips `time_conv`. Then output `i` reads input frames `2i-2, 2i-1, 2i`.
    """

    def __init__(self, channels: int, temporal: bool, *, key: jax.Array, dtype: jnp.dtype):
        k1, k2 = jax.random.split(key)
        self.resample = Conv2d(channels, channels, 3, key=k1, dtype=dtype, stride=2, padding=(0, 1))
        self.time_conv = (
            CausalConv(channels, channels, (3, 1, 1), key=k2, dtype=dtype) if temporal else None
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        x = self.resample(x)
        if self.time_conv is None:
            return x
        before = past.take()
        past.keep(x[:, -1:])
        if before is None:
            return jnp.concatenate([x[:, :1], self._halve(x)], axis=1)
        return self._halve(jnp.concatenate([before, x], axis=1))

    def _halve(self, x: jax.Array) -> jax.Array:
        """`[b, 2n + 1, ...]` to `[b, n, ...]`: a window of three frames every two."""
        pairs = (x.shape[1] - 1) // 2
        kernel = self.time_conv.kernel[...].astype(x.dtype)
        y = self.time_conv.bias[...].astype(x.dtype)
        for tap in range(3):
            frames = x[:, tap : tap + 2 * pairs : 2]
            y = y + jnp.einsum("bthwi,io->bthwo", frames, kernel[tap, 0, 0])
        return y


class Upsample(nnx.Module):
    """Doubles height and width, halves channels; with `temporal`, doubles frames after the first.

    The clip's first frame skips `time_conv`, which never sees it: the convolution starts from
    zeros at the second.
    """

    def __init__(self, channels: int, temporal: bool, *, key: jax.Array, dtype: jnp.dtype):
        k1, k2 = jax.random.split(key)
        self.resample = Conv2d(channels, channels // 2, 3, key=k1, dtype=dtype)
        self.time_conv = (
            CausalConv(channels, 2 * channels, (3, 1, 1), key=k2, dtype=dtype) if temporal else None
        )

    def __call__(self, x: jax.Array, past: Past) -> jax.Array:
        if self.time_conv is not None:
            x = self._double(x, past)
        return self.resample(jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3))

    def _double(self, x: jax.Array, past: Past) -> jax.Array:
        before = past.take()
        inner = Past(None if before is None else (before,))
        if before is not None:
            y = _interleave(self.time_conv(x, inner))
        elif x.shape[1] > 1:
            y = jnp.concatenate([x[:, :1], _interleave(self.time_conv(x[:, 1:], inner))], axis=1)
        else:
            y = x
            inner.keep(jnp.zeros_like(x, shape=(x.shape[0], 2, *x.shape[2:])))
        past.keep(inner.kept[0])
        return y


def _interleave(x: jax.Array) -> jax.Array:
    """`[b, t, h, w, 2c]` to `[b, 2t, h, w, c]`: the halves of the channels become frame pairs."""
    b, t, height, width, channels = x.shape
    pairs = x.reshape(b, t, height, width, 2, channels // 2)
    return jnp.moveaxis(pairs, 4, 2).reshape(b, 2 * t, height, width, channels // 2)
