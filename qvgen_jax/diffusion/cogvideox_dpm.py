"""DPM-Solver++ (2M, SDE) for v-prediction, CogVideoX's stochastic sampler.

Lu et al., "DPM-Solver++" (arXiv 2211.01095), with the choices of diffusers'
`CogVideoXDPMScheduler`. Each step adds fresh noise.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.diffusion.v_prediction import VPredictionConfig, trailing_steps


@dataclass(frozen=True)
class CogVideoXDPMConfig(VPredictionConfig):
    """The noise process, to be followed by DPM-Solver++."""

    class_name: ClassVar[str] = "CogVideoXDPMScheduler"


class CogVideoXDPMSchedule(NamedTuple):
    """One row per step (numpy float32).

    Attributes:
        timesteps: `[steps]`, what the model reads: whole numbers.
        clean: `[steps, 2]`, factors of (sample, velocity) in the clean latents.
        predict: `[steps, 4]`, factors of (sample, clean latents, the last step's clean latents,
            fresh noise) in the next sample.
    """

    timesteps: np.ndarray
    clean: np.ndarray
    predict: np.ndarray


def cogvideox_dpm_schedule(config: CogVideoXDPMConfig, steps: int) -> CogVideoXDPMSchedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a whole number from 1 to the number of training timesteps.
    """
    timesteps, start, end, final = trailing_steps(config, steps)
    # At a = 0, where sampling starts, and a = 1, where it ends, the log signal-to-noise ratio is
    # infinite; every factor has its limit there.
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr, log_snr_end = (0.5 * (np.log(a) - np.log1p(-a)) for a in (start, end))
        h = log_snr_end - log_snr
        slope = h / (2 * np.append(np.inf, log_snr[1:] - log_snr[:-1]))
    # The first step has no predecessor; the last goes to its own clean prediction.
    slope = np.where(final | (np.arange(steps) == 0), 0.0, slope)
    gain = -np.expm1(-2 * h) * np.sqrt(end)
    predict = [
        np.sqrt((1 - end) / (1 - start)) * np.exp(-h),
        gain * (1 + slope),
        -gain * slope,
        np.sqrt(1 - end) * np.sqrt(-np.expm1(-2 * h)),
    ]
    clean = np.stack([np.sqrt(start), -np.sqrt(1 - start)], -1)
    return CogVideoXDPMSchedule(
        timesteps.astype(np.float32),
        clean.astype(np.float32),
        np.stack(predict, -1).astype(np.float32),
    )


def start(noise: jax.Array, schedule: CogVideoXDPMSchedule) -> tuple[jax.Array, jax.Array]:
    """The carry before the first step: (sample, the last step's clean latents)."""
    return noise, jnp.zeros_like(noise)


def rows(schedule: CogVideoXDPMSchedule) -> tuple:
    """What `advance` is told, arrays `[steps, ...]`."""
    return np.arange(len(schedule.timesteps), dtype=np.int32), *schedule


def advance(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: tuple[jax.Array, jax.Array],
    row: tuple,
    step_noise: jax.Array,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """One step; see `unipc.advance`.

    Args:
        step_noise: PRNG keys `[batch]`, from each of which one sample's noise in every step is
            drawn, whatever its neighbours; or the noise itself, float32 `[steps, *noise.shape]`.
    """
    latents, last_clean = carry
    step, timestep, to_clean, predict = row
    velocity = velocity_fn(latents, timestep, step).astype(jnp.float32)
    clean = to_clean[0] * latents + to_clean[1] * velocity
    following = predict[0] * latents + predict[1] * clean + predict[2] * last_clean
    fresh = _fresh_noise(step_noise, step, latents.shape[1:])
    return (following + predict[3] * fresh, clean), clean


def _fresh_noise(step_noise: jax.Array, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if not jnp.issubdtype(step_noise.dtype, jax.dtypes.prng_key):
        return step_noise[step]
    keys = jax.vmap(jax.random.fold_in, (0, None))(step_noise, step)
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
