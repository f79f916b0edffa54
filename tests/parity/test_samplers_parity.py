"""Our samplers against diffusers' schedulers, for any number of steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from qvgen_jax.diffusion.guidance import Guidance, guided  # noqa: E402
from qvgen_jax.diffusion.schedulers import (  # noqa: E402
    make_schedule,
    sample,
    scheduler_from_json,
)
from tests.golden.make_samplers import (  # noqa: E402
    COGVIDEOX,
    given_noise,
    guided_trajectory,
    trajectory,
)
from tests.parity.table import hold  # noqa: E402

OPTIONS = {
    "CogVideoXDDIMScheduler": [
        COGVIDEOX,
        COGVIDEOX | {"snr_shift_scale": 1.0, "set_alpha_to_one": False},
        COGVIDEOX | {"rescale_betas_zero_snr": False},
    ],
    "FlowMatchEulerDiscreteScheduler": [{"shift": shift} for shift in (1.0, 3.0, 5.0)],
}
OPTIONS["CogVideoXDPMScheduler"] = OPTIONS["CogVideoXDDIMScheduler"]
CASES = [(kind, options) for kind, several in OPTIONS.items() for options in several]


def fields_of(scheduler) -> dict:
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def velocity(x, timestep, step):
    """The one of make_samplers.py."""
    return jnp.sin(2.0 * x) + x * (timestep / 1000.0) - 0.3


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 25, 50])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_any_number_of_steps_follows_diffusers(kind, options, steps):
    rng = np.random.default_rng(steps)
    noise = rng.standard_normal((2, 5, 7)).astype(np.float32)
    noises = rng.standard_normal((steps, 2, 5, 7)).astype(np.float32)
    scheduler = getattr(diffusers, kind)(**options)
    with given_noise(noises, scheduler):
        expected, timesteps = trajectory(scheduler, noise, steps)
    schedule = make_schedule(scheduler_from_json(fields_of(scheduler)), steps)
    ours = jax.jit(lambda *arrays: sample(velocity, arrays[0], schedule, arrays[1]))(noise, noises)

    np.testing.assert_array_equal(schedule.timesteps, timesteps)
    # Both are float32 sums of the same terms in another order: rounding only.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    hold("Samplers", f"{kind}, up to 50 steps", error, 1e-5)


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_timesteps_are_diffusers_for_every_step_count(kind, options):
    """A rounding difference of the last bit would move a rounded timestep by one."""
    scheduler = getattr(diffusers, kind)(**options)
    config = scheduler_from_json(fields_of(scheduler))
    for steps in range(1, 200):
        scheduler.set_timesteps(steps)
        timesteps = make_schedule(config, steps).timesteps
        # For some counts rounding adds a step at timestep -1 to diffusers'.
        np.testing.assert_array_equal(timesteps, scheduler.timesteps.numpy()[:steps])
        assert (scheduler.timesteps.numpy()[steps:] == -1).all()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("two_passes", [False, True])
@pytest.mark.parametrize("kind", ["CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"])
def test_guidance_follows_the_loop_of_the_cogvideox_pipeline(kind, two_passes, dynamic):
    rng = np.random.default_rng(7)
    noise = rng.standard_normal((2, 3, 1, 5, 2)).astype(np.float32)
    noises = rng.standard_normal((13, *noise.shape)).astype(np.float32)
    texts = rng.standard_normal((2, 2, 3, 4)).astype(np.float32)
    scheduler = getattr(diffusers, kind)(**COGVIDEOX)
    with given_noise(np.ascontiguousarray(noises.transpose(0, 1, 2, 5, 3, 4)), scheduler):
        expected = guided_trajectory(scheduler, noise, texts, 13, 6.0, dynamic)

    def model(latents, timesteps, text):
        moved = latents + text.mean((1, 2)).reshape(-1, 1, 1, 1, 1)
        return velocity(moved, timesteps.reshape(-1, 1, 1, 1, 1), None)

    schedule = make_schedule(scheduler_from_json(fields_of(scheduler)), 13)
    scales = jnp.asarray(Guidance(6.0, dynamic).scales(schedule.timesteps))
    predict = guided(model, *texts, scales, two_passes=two_passes)
    ours = jax.jit(lambda *arrays: sample(predict, arrays[0], schedule, arrays[1]))(noise, noises)
    # Guidance multiplies rounding by its scale in every step.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    hold("Samplers", f"{kind}, guided as CogVideoX's pipeline does", error)
