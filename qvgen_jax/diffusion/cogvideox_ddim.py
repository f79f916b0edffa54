"""DDIM for v-prediction, the deterministic sampler of CogVideoX (`CogVideoXDDIMScheduler`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.diffusion.v_prediction import VPredictionConfig, trailing_steps


@dataclass(frozen=True)
class CogVideoXDDIMConfig(VPredictionConfig):
    """The noise process, to be followed by DDIM."""

    class_name: ClassVar[str] = "CogVideoXDDIMScheduler"


class CogVideoXDDIMSchedule(NamedTuple):
    """One row per step (numpy float32).

    Attributes:
        timesteps: `[steps]`, what the model reads: whole numbers.
        clean: `[steps, 2]`, factors of (sample, velocity) in the clean latents.
        predict: `[steps, 2]`, factors of (sample, clean latents) in the next sample.
    """

    timesteps: np.ndarray
    clean: np.ndarray
    predict: np.ndarray


def cogvideox_ddim_schedule(config: CogVideoXDDIMConfig, steps: int) -> CogVideoXDDIMSchedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a whole number from 1 to the number of training timesteps.
    """
    timesteps, start, end, _ = trailing_steps(config, steps)
    keep = np.sqrt((1 - end) / (1 - start))
    predict = np.stack([keep, np.sqrt(end) - np.sqrt(start) * keep], -1)
    clean = np.stack([np.sqrt(start), -np.sqrt(1 - start)], -1)
    return CogVideoXDDIMSchedule(
        timesteps.astype(np.float32), clean.astype(np.float32), predict.astype(np.float32)
    )


def start(noise: jax.Array, schedule: CogVideoXDDIMSchedule) -> tuple[jax.Array]:
    """The carry before the first step: the sample alone."""
    return (noise,)


def rows(schedule: CogVideoXDDIMSchedule) -> tuple:
    """What `advance` is told, arrays `[steps, ...]`."""
    return np.arange(len(schedule.timesteps), dtype=np.int32), *schedule


def advance(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: tuple[jax.Array],
    row: tuple,
) -> tuple[tuple[jax.Array], jax.Array]:
    """One step; see `unipc.advance`."""
    (latents,) = carry
    step, timestep, to_clean, predict = row
    velocity = velocity_fn(latents, timestep, step).astype(jnp.float32)
    clean = to_clean[0] * latents + to_clean[1] * velocity
    return (predict[0] * latents + predict[1] * clean,), clean
