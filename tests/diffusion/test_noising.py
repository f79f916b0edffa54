"""The noise that training adds is the one that the family's sampler takes away."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.diffusion import flow, v_prediction
from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError

COGVIDEOX = CogVideoXDDIMConfig(rescale_betas_zero_snr=True)
CLEAN, NOISE = (
    jnp.asarray(np.random.default_rng(seed).standard_normal((2, 3, 4, 5)), jnp.float32)
    for seed in range(2)
)


@pytest.mark.parametrize("seed", range(3))
def test_the_velocity_of_either_process_leads_back_to_the_clip(seed):
    key = jax.random.key(seed)
    noisy, timestep, velocity = training_noise(UniPCConfig(), {"shift": 1.0})(key, CLEAN, NOISE)
    back = flow.denoise(noisy, velocity, timestep / 1000)
    # float32; the timestep is sigma to the last bit only at shift 1.
    np.testing.assert_allclose(back, CLEAN, atol=1e-5)

    alphas = COGVIDEOX.alphas_cumprod()
    noisy, timestep, velocity = training_noise(COGVIDEOX, {})(key, CLEAN, NOISE)
    t = timestep.astype(jnp.int32)
    back = v_prediction.denoise(noisy, velocity, t, alphas)
    np.testing.assert_allclose(back, CLEAN, atol=1e-5)
    assert timestep.dtype == jnp.float32


def test_a_config_of_the_other_family_is_refused():
    with pytest.raises(UserError, match=r"shift is missing.*1\.0"):
        training_noise(UniPCConfig(), {})
    with pytest.raises(UserError, match="CogVideoXDDIMScheduler is another process"):
        training_noise(COGVIDEOX, {"shift": 1.0})
