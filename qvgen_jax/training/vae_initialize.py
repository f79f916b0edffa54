"""Where a VAE that is trained from nothing starts: every frame by itself, nothing lost in time."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LOG_VARIANCE = -4.5  # Of the first latents: the decoder hears the encoder over its own noise.


def initial_params(params: Mapping[str, Any], key: jax.Array) -> dict:
    """Fresh parameters of `WanVAE`: LeCun kernels, zero biases.

    Of a temporal kernel only the last tap is set, so that it begins as a 2-D convolution of the
    current frame; `time_conv` begins as the average of its frames (down) or as two copies of one
    (up). A still clip thus has equal latents in every frame. With PyTorch's default initialisation
    the training collapses to the background.

    Args:
        params: the tree, of arrays or of shapes.
        key: a random key.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    keys = jax.random.split(key, len(leaves))
    fresh = [
        _initial(tuple(part.key for part in path), leaf.shape, k)
        for (path, leaf), k in zip(leaves, keys, strict=True)
    ]
    params = jax.tree.unflatten(tree, fresh)
    quant = params["quant_conv"]
    z = quant["bias"].shape[0] // 2
    quant["kernel"] = quant["kernel"].at[..., z:].multiply(0.1)
    quant["bias"] = quant["bias"].at[z:].set(LOG_VARIANCE)
    return params


def _initial(path: tuple[str, ...], shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if path[-1] == "gamma":
        return jnp.ones(shape, jnp.float32)
    if path[-1] == "bias":
        return jnp.zeros(shape, jnp.float32)
    if path[-2] == "time_conv":
        channels, out = shape[-2:]
        copies = jnp.tile(jnp.eye(channels, dtype=jnp.float32), (1, out // channels))
        if out == channels:
            return jnp.broadcast_to(copies / shape[0], shape)
        return jnp.zeros(shape, jnp.float32).at[-1].set(copies)
    *window, channels, out = shape
    taps = window[0] if len(window) == 3 else 1
    std = (math.prod(window) // taps * channels) ** -0.5
    kernel = std * jax.random.normal(key, (*window[-2:], channels, out), jnp.float32)
    if len(window) == 2:
        return kernel
    return jnp.zeros(shape, jnp.float32).at[-1].set(kernel)
