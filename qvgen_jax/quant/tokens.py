"""Activations quantized in training: learned clips, and gradients as in QVGen's release."""

import math

import jax
import jax.numpy as jnp

from kernels.quantize_tokens import (
    QuantizedTokens,
    dequantize_tokens,
    encode_tokens,
    token_range,
)
from kernels.reference import signed_offset


def initial_clips(buckets: int, initial_clip: float = 0.95) -> jax.Array:
    """Raw clip parameters float32 `[buckets]` whose sigmoid is `initial_clip`."""
    return jnp.full((buckets,), math.log(initial_clip / (1 - initial_clip)), jnp.float32)


def of_bucket(values: jax.Array, clip_index: jax.Array | None, ndim: int) -> jax.Array:
    """Each sample's entry of `values [buckets]`, shaped to broadcast over `[batch, ..., in]`.

    Args:
        values: parameters of a layer, one per bucket; one bucket serves every timestep.
        clip_index: int32 `[batch]`; may be None where there is one bucket.
        ndim: rank of the activations.

    Returns:
        `[batch, 1, ..., 1]`; `[1, 1, ..., 1]` of one bucket.

    Raises:
        ValueError: several buckets and no index.
    """
    if values.shape[0] > 1 and clip_index is None:
        raise ValueError(
            f"a layer with {values.shape[0]} clip pairs needs QuantContext(clip_index=[batch]); "
            "qvgen_jax.quant.clips.clip_index(timesteps, mode) computes it"
        )
    chosen = values if values.shape[0] == 1 else values[clip_index]
    return chosen.reshape(chosen.shape + (1,) * (ndim - 1))


def clip_multipliers(clips: jax.Array, clip_index: jax.Array | None, ndim: int) -> jax.Array:
    """Sigmoid of each sample's clip, shaped to multiply `[batch, ..., 1]` of rank `ndim`.

    Arguments as of `of_bucket`; of one bucket the result is a scalar.
    """
    if clips.shape[0] == 1:
        return jax.nn.sigmoid(clips[0])
    return jax.nn.sigmoid(of_bucket(clips, clip_index, ndim))


@jax.custom_vjp
def _straight_through(
    x: jax.Array, scale: jax.Array, tokens: QuantizedTokens, levels: jax.Array
) -> jax.Array:
    """The tokens' values; rounding differentiates as the identity, the clamp inclusively."""
    del scale, levels
    return dequantize_tokens(tokens).astype(x.dtype)


def _forward(x, scale, tokens, levels):
    return _straight_through(x, scale, tokens, levels), (x, tokens, levels)


def _backward(residuals, cotangent):
    x, tokens, levels = residuals
    scale = tokens.scale
    ratio = x.astype(scale.dtype) / scale
    zero_point = tokens.zero_point + signed_offset(levels)
    unclamped = jnp.round(ratio) + zero_point
    inside = (unclamped >= 0) & (unclamped <= levels)
    d_codes = tokens.codes.astype(scale.dtype) - tokens.zero_point - jnp.where(inside, ratio, 0)
    d_scale = jnp.sum(cotangent.astype(scale.dtype) * d_codes, axis=-1, keepdims=True)
    return jnp.where(inside, cotangent, 0).astype(x.dtype), d_scale, None, None


_straight_through.defvjp(_forward, _backward)


def fake_quantize_tokens(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    range_dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, QuantizedTokens]:
    """The tokens in integers, and their values as a differentiable function of x and the clips.

    The gradient reaches x where it is not clipped, and through the scale each token's minimum and
    maximum and the clips; none passes through the zero point.

    Args:
        x: `[batch, ..., in]`.
        lower: multiplier of the minimum (after the sigmoid), broadcastable to `[batch, ..., 1]`.
        upper: multiplier of the maximum.
        levels: float32 `[]`, 2^bits - 1.
        include_zero: see `kernels.quantize_tokens.token_range`; False is the release.
        clip_ratio: the release multiplies by 0.95 once more.
        range_dtype: see `kernels.quantize_tokens.quantize_tokens`.

    Returns:
        values `[batch, ..., in]` in x's dtype, and the tokens (without gradient).
    """
    # One array for all that reads it. Where the compiler computes x twice, in two fusions, the last
    # bits differ, and the gradient of a minimum that is looked for in the other one is lost.
    x = jax.lax.optimization_barrier(x)
    wide = x.astype(range_dtype)
    scale, zero_point = token_range(
        wide, lower, upper, levels, include_zero=include_zero, clip_ratio=clip_ratio
    )
    fixed, fixed_scale = jax.lax.stop_gradient((wide, scale))
    tokens = encode_tokens(fixed, fixed_scale, zero_point, levels)
    return _straight_through(x, scale, tokens, levels), tokens
