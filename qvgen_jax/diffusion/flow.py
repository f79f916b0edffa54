"""Flow matching: the straight path from noise to latents, and the noise levels on it.

At noise level sigma the sample is `(1 - sigma) * latents + sigma * noise`; the model predicts its
derivative in sigma, the velocity `noise - latents`. Models read timesteps, `1000 * sigma` without
its fraction.
"""

import jax
import jax.numpy as jnp

from kernels.reference import at_least_float32

NUM_TRAIN_TIMESTEPS = 1000


def shift_sigma(sigma, shift: float):
    """Moves noise levels towards 1 for shift > 1, as larger videos need: `s x / (1 + (s - 1) x)`.

    The order of operations is diffusers': timesteps are truncated to integers afterwards, and
    another order would move some of them by one.
    """
    return shift * sigma / (1 + (shift - 1) * sigma)


def _per_sample(sigma: jax.Array, like: jax.Array) -> jax.Array:
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(latents: jax.Array, noise: jax.Array, sigma: jax.Array) -> jax.Array:
    """`(1 - sigma) latents + sigma noise`: latents `[batch, ...]`, sigma `[batch]` or scalar."""
    sigma = _per_sample(sigma, latents)
    return (1 - sigma) * latents + sigma * noise


def velocity_target(latents: jax.Array, noise: jax.Array) -> jax.Array:
    """What the model should predict: the derivative of the noisy sample in sigma."""
    return noise - latents


def denoise(noisy: jax.Array, velocity: jax.Array, sigma: jax.Array) -> jax.Array:
    """The clean latents that a velocity implies: `noisy - sigma * velocity`."""
    return noisy - _per_sample(sigma, noisy) * velocity


def sample_sigmas(
    key: jax.Array,
    shape: tuple[int, ...] = (),
    shift: float = 1.0,
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """Noise levels for training, `shape`: uniform on 1/1000, 2/1000, ... 1, then shifted.

    Wan was trained, and QVGen trains, on the integer timesteps 1 to 1000; zero is left out.
    """
    steps = jax.random.randint(key, shape, 1, NUM_TRAIN_TIMESTEPS + 1)
    return shift_sigma(steps.astype(dtype) / NUM_TRAIN_TIMESTEPS, shift)


def to_timesteps(sigma: jax.Array) -> jax.Array:
    """What models read for a noise level: whole numbers in 0..1000, float32 (float64 of float64).

    The fraction is cut off, as the sampler and Wan's training do, so that a model is trained on the
    numbers (and the learned clips) that it is sampled with. The small addend keeps 20/1000 at 20.
    """
    return jnp.floor(at_least_float32(jnp.asarray(sigma)) * NUM_TRAIN_TIMESTEPS + 1e-3)
