"""Our sampler against diffusers' UniPCMultistepScheduler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from qvgen_jax.diffusion.schedulers import sample  # noqa: E402
from qvgen_jax.diffusion.unipc import UniPCConfig, unipc_schedule  # noqa: E402
from tests.parity.table import hold  # noqa: E402

WAN = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def _diffusers_trajectory(noise, velocity, steps, options):
    scheduler = diffusers.UniPCMultistepScheduler(**WAN, **options)
    scheduler.set_timesteps(steps)
    x = torch.from_numpy(noise)
    for timestep in scheduler.timesteps:
        v = torch.tensor(np.asarray(velocity(x.numpy(), timestep.item()), np.float32))
        x = scheduler.step(v, timestep, x).prev_sample
    return x.numpy(), scheduler.timesteps.numpy(), dict(scheduler.config)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 25, 50])
def test_any_number_of_steps_follows_diffusers(steps, shift, order):
    rng = np.random.default_rng(steps)
    noise = rng.standard_normal((2, 4, 7)).astype(np.float32)
    mix = (rng.standard_normal((7, 7)) / 7**0.5).astype(np.float32)

    def velocity(x, timestep):
        return jnp.tanh(jnp.dot(x, mix, precision="highest")) + 1e-3 * timestep * x

    expected, timesteps, config = _diffusers_trajectory(
        noise, velocity, steps, {"flow_shift": shift, "solver_order": order}
    )
    schedule = unipc_schedule(UniPCConfig.from_json(config), steps)
    ours = jax.jit(lambda n: sample(lambda x, t, step: velocity(x, t), n, schedule))(noise)

    np.testing.assert_array_equal(schedule.timesteps, timesteps)
    # Both are float32 sums of the same terms in another order: rounding only.
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    hold("Samplers", "UniPCMultistepScheduler (flow), up to 50 steps", error, 1e-5)


def test_timesteps_are_diffusers_for_every_step_count():
    """A rounding difference of the last bit would move a truncated timestep by one."""
    for shift in (1.0, 2.0, 3.0, 5.0, 7.0):
        for steps in range(1, 120):
            scheduler = diffusers.UniPCMultistepScheduler(**WAN, flow_shift=shift)
            scheduler.set_timesteps(steps)
            schedule = unipc_schedule(UniPCConfig(flow_shift=shift), steps)
            np.testing.assert_array_equal(schedule.timesteps, scheduler.timesteps.numpy())
            np.testing.assert_array_equal(schedule.sigmas, scheduler.sigmas.numpy())
