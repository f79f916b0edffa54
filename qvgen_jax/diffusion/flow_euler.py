"""Euler's method for flow prediction (diffusers, `FlowMatchEulerDiscreteScheduler`)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.config_fields import check_fields
from qvgen_jax.diffusion.flow import denoise, shift_sigma
from qvgen_jax.diffusion.scheduler_config import FILE, Levels, Shift, check_options, check_steps

_SUPPORTED = {
    "_class_name": ("FlowMatchEulerDiscreteScheduler",),
    "use_dynamic_shifting": (False,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "stochastic_sampling": (False,),
}


@dataclass(frozen=True)
class FlowEulerConfig:
    """The part of `scheduler_config.json` that sampling depends on; `flow_shift` is its `shift`."""

    num_train_timesteps: Levels = 1000
    flow_shift: Shift = 1.0

    @classmethod
    def from_json(cls, fields: Mapping) -> "FlowEulerConfig":
        """Reads diffusers' fields.

        Raises:
            UserError: the scheduler is another one or uses an option that is not implemented, or
                a value is not of its kind or range.
        """
        check_options(fields, _SUPPORTED, (), "use a constant shift and plain sigmas, as Wan does")
        config = cls(fields.get("num_train_timesteps", 1000), fields.get("shift", 1.0))
        check_fields(config, FILE, names={"flow_shift": "shift"})
        return config


class FlowEulerSchedule(NamedTuple):
    """One row per step (numpy float32).

    Attributes:
        timesteps: `[steps]`, what the model reads: `1000 * sigma`, not truncated.
        sigmas: `[steps + 1]`, the noise levels; the last is 0.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray


def flow_euler_schedule(config: FlowEulerConfig, steps: int) -> FlowEulerSchedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a positive whole number.
    """
    check_steps(steps)
    count = config.num_train_timesteps
    # As in diffusers: the smallest level is shifted in float32, and again with all the others.
    ends = shift_sigma(np.array([count, 1], np.float32) / np.float32(count), config.flow_shift)
    sigmas = np.linspace(*(ends.astype(np.float64) * count), steps) / count
    sigmas = shift_sigma(sigmas, config.flow_shift).astype(np.float32)
    return FlowEulerSchedule(sigmas * np.float32(count), np.append(sigmas, np.float32(0)))


def start(noise: jax.Array, schedule: FlowEulerSchedule) -> tuple[jax.Array]:
    """The carry before the first step: the sample alone."""
    return (noise,)


def rows(schedule: FlowEulerSchedule) -> tuple:
    """What `advance` is told, arrays `[steps]`."""
    steps = np.arange(len(schedule.timesteps), dtype=np.int32)
    return steps, schedule.timesteps, schedule.sigmas[:-1], schedule.sigmas[1:]


def advance(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: tuple[jax.Array],
    row: tuple,
) -> tuple[tuple[jax.Array], jax.Array]:
    """One step; see `unipc.advance`."""
    (latents,) = carry
    step, timestep, sigma, following = row
    velocity = velocity_fn(latents, timestep, step).astype(jnp.float32)
    return (latents + (following - sigma) * velocity,), denoise(latents, velocity, sigma)
