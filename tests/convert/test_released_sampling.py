"""The released clip countdown in the sampling loop."""

import jax.numpy as jnp
import numpy as np

from convert.released import import_released
from qvgen_jax.diffusion.flow_euler import FlowEulerConfig
from qvgen_jax.diffusion.schedulers import make_schedule
from tests.convert.released_checkpoints import WAN, Release, read_packed


def test_sampling_counts_the_calls_as_the_released_wan_script_does(tmp_path):
    release = Release(tmp_path, "wan", WAN)
    import_released(release.source, release.base, tmp_path / "ours")
    model = read_packed(tmp_path / "ours" / "transformer")
    noise, _, text = release.inputs("countdown")
    negative, schedule = text[:, ::-1], make_schedule(FlowEulerConfig(), 2)
    ours = model.sample(noise, text, negative, 3.0, schedule)
    latents, call = noise, 0
    for i, timestep in enumerate(schedule.timesteps):
        velocities = []
        for embeds in (text, negative):
            index = jnp.full((1,), 49 - call)
            times = jnp.full((1,), timestep)
            velocities.append(model(latents, times, embeds, clip_index=index))
            call += 1
        guided = velocities[1] + 3.0 * (velocities[0] - velocities[1])
        latents = latents + (schedule.sigmas[i + 1] - schedule.sigmas[i]) * guided
    # A code may flip between two compilations; a wrong clip moves the result by more.
    np.testing.assert_allclose(ours, latents, atol=1e-3)
