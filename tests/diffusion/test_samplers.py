"""Every sampler against what diffusers recorded, and how a folder's scheduler is chosen."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig, CogVideoXDPMSchedule
from qvgen_jax.diffusion.flow_euler import FlowEulerConfig
from qvgen_jax.diffusion.schedulers import make_schedule, sample, scheduler_from_json
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "samplers.npz")
PROCESS = {"rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}
CASES = {  # as in tests/golden/make_samplers.py
    "euler_1": (FlowEulerConfig(flow_shift=3.0), 1),
    "euler_7": (FlowEulerConfig(flow_shift=5.0), 7),
    "euler_50": (FlowEulerConfig(flow_shift=3.0), 50),
    "ddim_1": (CogVideoXDDIMConfig(**PROCESS), 1),
    "ddim_2": (CogVideoXDDIMConfig(**PROCESS), 2),
    "ddim_7": (CogVideoXDDIMConfig(**PROCESS | {"snr_shift_scale": 1.0}), 7),
    "ddim_50": (CogVideoXDDIMConfig(**PROCESS), 50),
    "dpm_1": (CogVideoXDPMConfig(**PROCESS), 1),
    "dpm_2": (CogVideoXDPMConfig(**PROCESS), 2),
    "dpm_7": (CogVideoXDPMConfig(**PROCESS), 7),
    "dpm_50": (CogVideoXDPMConfig(**PROCESS | {"snr_shift_scale": 1.0}), 50),
}
# As published with CogVideoX-2B.
COGVIDEOX_JSON = {
    "_class_name": "CogVideoXDDIMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
    "snr_shift_scale": 3.0,
    "steps_offset": 0,
    "timestep_spacing": "trailing",
    "trained_betas": None,
}
EULER_JSON = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "invert_sigmas": False,
    "num_train_timesteps": 1000,
    "shift": 8.0,
    "shift_terminal": None,
    "use_dynamic_shifting": False,
}


def velocity(x, timestep, step):
    return jnp.sin(2.0 * x) + x * (timestep / 1000.0) - 0.3


def run(config, steps, noise=GOLDEN["noise"], step_noise=GOLDEN["noises"]):
    schedule = make_schedule(config, steps)
    return jax.jit(lambda *arrays: sample(velocity, arrays[0], schedule, arrays[1]))(
        noise, step_noise
    )


@pytest.mark.parametrize("name", CASES)
def test_the_trajectory_is_the_one_of_diffusers(name):
    config, steps = CASES[name]
    expected = GOLDEN[f"{name}.sample"]
    np.testing.assert_array_equal(
        make_schedule(config, steps).timesteps, GOLDEN[f"{name}.timesteps"]
    )
    # Both are float32 sums of the same terms in another order: rounding only.
    assert np.abs(run(config, steps) - expected).max() / np.abs(expected).max() <= 1e-5


@pytest.mark.parametrize("steps", [1, 2, 61, 103, 998, 1000])
@pytest.mark.parametrize("config", [CogVideoXDDIMConfig, CogVideoXDPMConfig])
def test_any_step_count_gives_that_many_finite_steps_from_999(config, steps):
    schedule = make_schedule(config(**PROCESS), steps)
    assert len(schedule.timesteps) == len(schedule.predict) == steps
    assert schedule.timesteps[0] == 999
    assert schedule.timesteps[-1] >= 0
    assert np.isfinite(schedule.predict).all()


def test_a_sample_of_the_stochastic_sampler_depends_on_its_own_key_alone():
    config, noise = CogVideoXDPMConfig(**PROCESS), GOLDEN["noise"]
    keys = jax.random.split(jax.random.key(3), 2)
    both = run(config, 6, noise, keys)
    alone = run(config, 6, noise[1:], keys[1:])
    np.testing.assert_allclose(both[1:], alone, atol=1e-6)
    other_key = run(config, 6, noise[1:], keys[:1])
    assert np.abs(other_key - alone).max() > 0.01


def test_noise_drawn_from_keys_is_new_in_every_step():
    steps, start = 3, np.zeros((1, 20_000), np.float32)
    adding = np.tile(np.float32([1, 0, 0, 1]), (steps, 1))  # next sample = sample + fresh noise
    schedule = CogVideoXDPMSchedule(np.zeros(steps), np.zeros((steps, 2)), adding)
    total = sample(velocity, start, schedule, jax.random.split(jax.random.key(0), 1))
    # The same noise three times would have a variance of 9; 20,000 draws know it to 1 %.
    np.testing.assert_allclose(np.var(np.asarray(total)), steps, rtol=0.05)


def test_the_stochastic_sampler_asks_for_its_noise():
    with pytest.raises(UserError, match="step_noise is None"):
        run(CogVideoXDPMConfig(), 2, step_noise=None)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (COGVIDEOX_JSON, CogVideoXDDIMConfig(rescale_betas_zero_snr=True)),
        (
            COGVIDEOX_JSON | {"_class_name": "CogVideoXDPMScheduler", "snr_shift_scale": 1.0},
            CogVideoXDPMConfig(rescale_betas_zero_snr=True, snr_shift_scale=1.0),
        ),
        (EULER_JSON, FlowEulerConfig(flow_shift=8.0)),
        (
            {
                "_class_name": "UniPCMultistepScheduler",
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
            },
            UniPCConfig(),
        ),
    ],
    ids=["ddim", "dpm", "euler", "unipc"],
)
def test_the_folder_chooses_the_sampler(fields, expected):
    assert scheduler_from_json(fields) == expected


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"_class_name": "DDPMScheduler"}, "'DDPMScheduler'"),
        ({}, "_class_name is None"),
        (EULER_JSON | {"use_dynamic_shifting": True}, "use_dynamic_shifting is True"),
        (EULER_JSON | {"stochastic_sampling": True}, "stochastic_sampling"),
        (EULER_JSON | {"shift_terminal": 0.1}, "shift_terminal"),
        (COGVIDEOX_JSON | {"prediction_type": "epsilon"}, "prediction_type is 'epsilon'"),
        (COGVIDEOX_JSON | {"timestep_spacing": "leading"}, "timestep_spacing"),
        (COGVIDEOX_JSON | {"beta_schedule": "linear"}, "beta_schedule"),
        ({"_class_name": "CogVideoXDPMScheduler"}, "prediction_type is None"),
    ],
)
def test_an_unsupported_scheduler_is_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        scheduler_from_json(fields)


@pytest.mark.parametrize("steps", [0, 1001, 2.5, True])
def test_a_step_count_that_is_no_count_is_refused(steps):
    with pytest.raises(UserError, match="steps is"):
        make_schedule(CogVideoXDDIMConfig(), steps)
