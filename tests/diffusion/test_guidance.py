"""Guidance: diffusers' CogVideoX loop, its two forms, and the steps without it."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.diffusion.flow_euler import FlowEulerConfig
from qvgen_jax.diffusion.guidance import Guidance, dynamic_scale, guided
from qvgen_jax.diffusion.schedulers import make_schedule, sample
from qvgen_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
PROCESS = {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}


def model(latents, timesteps, text_embeds):
    """The velocity of make_samplers.py, of latents moved by the mean of the text."""
    x = latents + text_embeds.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
    return jnp.sin(2.0 * x) + x * (timesteps.reshape(-1, 1, 1, 1, 1) / 1000.0) - 0.3


def run(config, steps, guidance, model=model, negative=GOLDEN["texts"][1]):
    schedule = make_schedule(config, steps)
    scales = guidance.scales(schedule.timesteps)
    form = {"two_passes": guidance.two_passes, "skips": bool((scales == 1).any())}

    def trajectory(noise, noises):
        predict = guided(model, GOLDEN["texts"][0], negative, jnp.asarray(scales), **form)
        return sample(predict, noise, schedule, noises)

    return jax.jit(trajectory)(GOLDEN["noise"], GOLDEN["noises"])


@pytest.mark.parametrize("two_passes", [False, True])
def test_both_forms_follow_the_loop_of_the_cogvideox_pipeline(two_passes):
    ours = run(CogVideoXDDIMConfig(**PROCESS), 5, Guidance(6.0, two_passes=two_passes))
    expected = GOLDEN["guided_ddim_5"]
    # Guidance multiplies rounding by its scale in every step.
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-5


def test_the_dynamic_scale_is_the_one_of_the_cogvideox_pipeline():
    ours = run(CogVideoXDPMConfig(**PROCESS), 50, Guidance(6.0, dynamic=True))
    expected = GOLDEN["guided_dpm_50"]
    assert np.abs(ours - expected).max() / np.abs(expected).max() <= 1e-4


def test_the_dynamic_scale_rises_over_the_last_timesteps():
    late = [dynamic_scale(6.0, timestep, 50) for timestep in (50, 40, 20, 0)]
    assert late[0] == 1
    assert late == sorted(late)
    assert late[-1] == 7
    scales = Guidance(6.0, dynamic=True).scales(np.arange(999, -1, -20))
    assert scales.min() >= 1
    assert scales.max() <= 7


@pytest.mark.parametrize("two_passes", [False, True])
def test_the_last_steps_without_guidance_never_compute_the_negative_prompt(two_passes):
    rows = []

    def counting(latents, timesteps, text_embeds):
        # The negative text's rows leave a mark whenever they are really computed.
        jax.debug.callback(lambda texts: rows.append(len(texts)), text_embeds)
        return model(latents, timesteps, text_embeds)

    guidance = Guidance(6.0, two_passes=two_passes, unguided_steps=3)
    ours = run(FlowEulerConfig(), 7, guidance, counting)
    jax.effects_barrier()
    assert sum(rows) == 4 * 4 + 3 * 2  # two videos: both texts in four steps, one in three

    scales = guidance.scales(np.zeros(7))
    np.testing.assert_array_equal(scales, [6, 6, 6, 6, 1, 1, 1])
    # At a scale of 1 the formula gives the prediction with text, to rounding.
    schedule = make_schedule(FlowEulerConfig(), 7)
    always = guided(model, *GOLDEN["texts"], jnp.asarray(scales))
    np.testing.assert_allclose(ours, sample(always, GOLDEN["noise"], schedule), atol=1e-5)


def test_no_negative_prompt_means_no_guidance():
    plain = run(FlowEulerConfig(), 3, Guidance(6.0), negative=None)
    off = run(FlowEulerConfig(), 3, Guidance(6.0, unguided_steps=3))
    np.testing.assert_allclose(plain, off, atol=1e-6)


@pytest.mark.parametrize("unguided", [-1, 8])
def test_unguided_steps_must_fit_the_trajectory(unguided):
    with pytest.raises(UserError, match=f"unguided_steps is {unguided}"):
        Guidance(6.0, unguided_steps=unguided).scales(np.zeros(7))
