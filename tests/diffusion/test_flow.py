import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.diffusion.flow import (
    add_noise,
    denoise,
    sample_sigmas,
    shift_sigma,
    to_timesteps,
    velocity_target,
)


def test_denoising_with_the_true_velocity_gives_the_latents_back():
    latents, noise = jax.random.normal(jax.random.key(0), (2, 3, 1, 5, 2))
    sigma = jnp.array([0.001, 0.5, 1.0])
    noisy = add_noise(latents, noise, sigma)
    np.testing.assert_allclose(noisy[2], noise[2], atol=1e-6)
    restored = denoise(noisy, velocity_target(latents, noise), sigma)
    np.testing.assert_allclose(restored, latents, atol=1e-6)


def test_shift_keeps_the_ends_and_raises_the_middle():
    sigma = np.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(shift_sigma(sigma, 3.0), [0.0, 0.75, 1.0])
    np.testing.assert_allclose(shift_sigma(sigma, 1.0), sigma)


def test_training_draws_every_timestep_from_1_to_1000():
    timesteps = to_timesteps(sample_sigmas(jax.random.key(1), (40_000,)))
    assert set(np.unique(timesteps)) == set(range(1, 1001))


def test_timesteps_are_whole_numbers_as_at_inference():
    sigma = np.arange(1, 1001) / 1000
    np.testing.assert_array_equal(to_timesteps(sigma), np.arange(1, 1001))
    assert to_timesteps(0.8769) == 876
