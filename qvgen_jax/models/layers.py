"""Norms, pairs of linears, the timestep embedding and patches: what both transformers share."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.fused_quantize import Normalized, layer_norm
from kernels.low_rank import rows_matmul
from kernels.reference import at_least_float32
from qvgen_jax.quant.apply import apply_normalized, apply_to_gelu
from qvgen_jax.quant.dense import QuantContext


class LayerNorm(nnx.Module):
    """LayerNorm with `scale` and `bias` `[dim]`; computes and returns float32."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        scale, bias = self.scale[...], self.bias[...]
        return layer_norm(x, self.eps) * at_least_float32(scale) + at_least_float32(bias)

    def tokens(self, x: jax.Array, dtype: jnp.dtype, **modulation) -> Normalized:
        """`self(x)`, to be computed where it is read; scale, shift and such as of `Normalized`."""
        weight, bias = self.scale[...], self.bias[...]
        return Normalized(x, self.eps, dtype, weight, bias, **modulation)


class RMSNorm(nnx.Module):
    """`x / rms(x) * scale` over the last axis; computes and returns float32."""

    def __init__(self, dim: int, *, eps: float):
        self.scale = nnx.Param(jnp.ones((dim,), jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x = at_least_float32(x)
        variance = jnp.square(x).mean(-1, keepdims=True)
        return x * jax.lax.rsqrt(variance + self.eps) * at_least_float32(self.scale[...])


class TwoLinears(nnx.Module):
    """`linear_2(activation(linear_1(x)))`, the form of the condition embedders."""

    def __init__(
        self,
        name: str,
        features: tuple[int, int],
        activation: Callable,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        fan_in, dim = features
        keys = jax.random.split(key)
        self.linear_1 = dense(f"{name}.linear_1", fan_in, dim, key=keys[0], dtype=dtype)
        self.linear_2 = dense(f"{name}.linear_2", dim, dim, key=keys[1], dtype=dtype)
        self.activation = activation

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        return self.linear_2(self.activation(self.linear_1(x, ctx)), ctx)


def linear(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """A `Dense` with a bias, of its params: `x [..., in]` to `[..., out]`, in float32."""
    kernel, bias = (layer[leaf].astype(jnp.float32) for leaf in ("kernel", "bias"))
    return rows_matmul(x.astype(jnp.float32), kernel) + bias


class FeedForward(nnx.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(
        self,
        name: str,
        dim: int,
        hidden: int,
        *,
        key: jax.Array,
        dense: Callable,
        dtype: jnp.dtype,
    ):
        keys = jax.random.split(key)
        self.up = dense(f"{name}.up", dim, hidden, key=keys[0], dtype=dtype)
        self.down = dense(f"{name}.down", hidden, dim, key=keys[1], dtype=dtype)

    def __call__(self, tokens: Normalized, ctx: QuantContext) -> jax.Array:
        (x,) = apply_normalized([self.up], tokens, ctx)
        return apply_to_gelu(self.down, x, ctx)


def timestep_embedding(timesteps: jax.Array, dim: int) -> jax.Array:
    """Sinusoids of the timestep, cosines first: `timesteps [batch]` to float32 `[batch, dim]`.

    diffusers' `Timesteps(flip_sin_to_cos=True, downscale_freq_shift=0)`; `dim` is even.
    """
    half = dim // 2
    # float32 as in PyTorch: at t = 1000 the last bit of a frequency is visible in the angle.
    exponents = np.arange(half, dtype=np.float32) * np.float32(-math.log(10000)) / np.float32(half)
    angles = at_least_float32(timesteps)[:, None] * np.exp(exponents)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def patchify(
    latents: jax.Array, patch: tuple[int, int, int], *, channels_first: bool = False
) -> jax.Array:
    """`[batch, frames, height, width, channels]` to `[batch, tokens, pt * ph * pw * channels]`.

    Args:
        patch: frames, height and width of a patch.
        channels_first: the order of a token's features: `(channels, pt, ph, pw)` in CogVideoX,
            `(pt, ph, pw, channels)` in Wan. Their checkpoints' linears are trained with it.
    """
    b, f, h, w, c = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(b, f // pt, pt, h // ph, ph, w // pw, pw, c)
    features = (7, 2, 4, 6) if channels_first else (2, 4, 6, 7)
    return x.transpose(0, 1, 3, 5, *features).reshape(b, -1, pt * ph * pw * c)


def unpatchify(
    tokens: jax.Array,
    grid: tuple[int, int, int],
    patch: tuple[int, int, int],
    *,
    channels_first: bool = False,
) -> jax.Array:
    """The inverse of `patchify`; `grid` is the number of patches along frames, height and width."""
    (f, h, w), (pt, ph, pw) = grid, patch
    if channels_first:
        x = tokens.reshape(tokens.shape[0], f, h, w, -1, pt, ph, pw)
        x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
    else:
        x = tokens.reshape(tokens.shape[0], f, h, w, pt, ph, pw, -1)
        x = x.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(x.shape[0], f * pt, h * ph, w * pw, -1)
