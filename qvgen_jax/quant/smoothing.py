"""Channels balanced between tokens and kernel at step 0 (SmoothQuant, arXiv 2211.10438, eq. 4).

A channel's tokens are divided by a factor and its kernel row multiplied by it: outliers of the
activations move into the weights, which have a scale per output channel and are trained. The
factors themselves are not.
"""

import jax
import jax.numpy as jnp

from kernels.reference import at_least_float32, wide_type

# Channels that are next to silent count as this share of the loudest, so that no factor is extreme.
_QUIETEST = 1e-3
_SMALLEST = 1e-12


def smooth_factors(
    activation_max: jax.Array,
    kernel: jax.Array,
    alpha: float | jax.Array,
    beta: float | jax.Array | None = None,
) -> jax.Array:
    """`max|x_j|^alpha / max|w_j|^beta`, divided by its geometric mean over the channels.

    A common factor changes no code. With a mean of 1 the kernel keeps its size, and a learning rate
    its meaning.

    Args:
        activation_max: `[..., in]`, the largest magnitude of each input channel.
        kernel: `[..., in, out]`.
        alpha: how much of the outliers moves; between 0 and 1.
        beta: of the kernel's magnitudes; 1 - alpha if None.

    Returns:
        Float32 (or float64, as the kernel) `[..., in]`, positive.
    """
    dtype = wide_type(kernel.dtype)
    of_tokens = _loud(activation_max.astype(dtype))
    of_kernel = _loud(jnp.max(jnp.abs(kernel.astype(dtype)), axis=-1))
    beta = 1 - alpha if beta is None else beta
    logs = alpha * jnp.log(of_tokens) - beta * jnp.log(of_kernel)
    return jnp.exp(logs - logs.mean(-1, keepdims=True))


def _loud(maxima: jax.Array) -> jax.Array:
    return jnp.maximum(maxima, jnp.maximum(_QUIETEST * maxima.max(-1, keepdims=True), _SMALLEST))


def smooth_tokens(x: jax.Array, factors: jax.Array) -> jax.Array:
    """`x [..., in]` with each channel divided by its factor `[in]`, in the dtype of `x`."""
    return (at_least_float32(x) / factors).astype(x.dtype)
