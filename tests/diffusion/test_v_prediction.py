"""CogVideoX's noise process against diffusers' recorded numbers, and what it should satisfy."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.v_prediction import (
    add_noise,
    denoise,
    sample_timesteps,
    velocity_target,
)

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
CONFIG = CogVideoXDDIMConfig(rescale_betas_zero_snr=True, snr_shift_scale=3.0)
TIMESTEPS = np.array([0, 17, 999])  # as in tests/golden/make_samplers.py


@pytest.fixture(scope="module")
def pair():
    return (jnp.asarray(GOLDEN["noises"][i, :1].repeat(3, 0)) for i in (0, 1))


def test_noising_and_its_target_are_diffusers(pair):
    latents, noise = pair
    alphas = CONFIG.alphas_cumprod()
    np.testing.assert_allclose(alphas[::37], GOLDEN["alphas"], rtol=1e-12)
    noisy = add_noise(latents, noise, TIMESTEPS, alphas)
    target = velocity_target(latents, noise, TIMESTEPS, alphas)
    # diffusers takes roots with a power, we with sqrt: the last bit of float32.
    np.testing.assert_allclose(noisy, GOLDEN["noisy"], atol=1e-6)
    np.testing.assert_allclose(target, GOLDEN["target"], atol=1e-6)
    np.testing.assert_allclose(denoise(noisy, target, TIMESTEPS, alphas), latents, atol=1e-6)


def test_the_last_timestep_is_noise_alone_if_the_signal_is_rescaled():
    alphas = CONFIG.alphas_cumprod()
    assert alphas[-1] == 0
    assert 0.99 < alphas[0] < 1
    assert (np.diff(alphas) < 0).all()
    assert CogVideoXDDIMConfig(rescale_betas_zero_snr=False).alphas_cumprod()[-1] > 0


def test_training_draws_every_timestep_from_0_to_999():
    drawn = sample_timesteps(jax.random.key(1), (40_000,))
    assert set(np.unique(drawn)) == set(range(1000))
