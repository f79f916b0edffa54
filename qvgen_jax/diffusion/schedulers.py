"""The samplers by the names that pipeline folders call them.

scheduler = scheduler_from_json(fields)            # of scheduler/scheduler_config.json
schedule = make_schedule(scheduler, 50)            # numpy arrays, one row per model call
latents = sample(model, noise, schedule, keys)     # a scan, under jit
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from qvgen_jax.diffusion import cogvideox_ddim, cogvideox_dpm, flow_euler, unipc
from qvgen_jax.errors import UserError

Scheduler = (
    unipc.UniPCConfig
    | flow_euler.FlowEulerConfig
    | cogvideox_ddim.CogVideoXDDIMConfig
    | cogvideox_dpm.CogVideoXDPMConfig
)
Schedule = (
    unipc.UniPCSchedule
    | flow_euler.FlowEulerSchedule
    | cogvideox_ddim.CogVideoXDDIMSchedule
    | cogvideox_dpm.CogVideoXDPMSchedule
)


class _Sampler(NamedTuple):
    config: type
    schedule: type
    make_schedule: Callable
    sample: Callable
    stochastic: bool = False


_SAMPLERS = {
    "UniPCMultistepScheduler": _Sampler(
        unipc.UniPCConfig, unipc.UniPCSchedule, unipc.unipc_schedule, unipc.sample
    ),
    "FlowMatchEulerDiscreteScheduler": _Sampler(
        flow_euler.FlowEulerConfig,
        flow_euler.FlowEulerSchedule,
        flow_euler.flow_euler_schedule,
        flow_euler.sample,
    ),
    "CogVideoXDDIMScheduler": _Sampler(
        cogvideox_ddim.CogVideoXDDIMConfig,
        cogvideox_ddim.CogVideoXDDIMSchedule,
        cogvideox_ddim.cogvideox_ddim_schedule,
        cogvideox_ddim.sample,
    ),
    "CogVideoXDPMScheduler": _Sampler(
        cogvideox_dpm.CogVideoXDPMConfig,
        cogvideox_dpm.CogVideoXDPMSchedule,
        cogvideox_dpm.cogvideox_dpm_schedule,
        cogvideox_dpm.sample,
        stochastic=True,
    ),
}


def scheduler_from_json(fields: Mapping[str, Any]) -> Scheduler:
    """The sampler that a `scheduler_config.json` asks for.

    Raises:
        UserError: it is not one of ours, or uses an option that is not implemented, or a value is
            not of its kind or range.
    """
    name = fields.get("_class_name")
    if not isinstance(name, str) or name not in _SAMPLERS:
        raise UserError(
            f"scheduler_config.json: _class_name is {name!r}, supported: {', '.join(_SAMPLERS)}; "
            "put the scheduler published with the model there"
        )
    return _SAMPLERS[name].config.from_json(fields)


def make_schedule(scheduler: Scheduler, steps: int) -> Schedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a whole number that the sampler can do.
    """
    return _sampler_of(scheduler).make_schedule(scheduler, steps)


def sample(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    noise: jax.Array,
    schedule: Schedule,
    step_noise: jax.Array | None = None,
) -> jax.Array:
    """Clean latents from noise, by the sampler that the schedule belongs to; jit it.

    Args:
        model: `(latents, timestep, step) -> prediction`, in the sampler's sense: a flow's velocity
            or v; timestep is a float32 scalar, step the int32 index of the call.
        noise: the start, float32 `[batch, ...]`.
        step_noise: PRNG keys `[batch]` or noises `[steps, *noise.shape]`, for a stochastic sampler
            (see `cogvideox_dpm.sample`); the others leave it aside.

    Raises:
        UserError: a stochastic sampler without `step_noise`.
    """
    sampler = _sampler_of(schedule)
    if not sampler.stochastic:
        return sampler.sample(model, noise, schedule)
    if step_noise is None:
        raise UserError(
            "step_noise is None, expected PRNG keys, one per video: this sampler adds noise in "
            "every step"
        )
    return sampler.sample(model, noise, schedule, step_noise)


def _sampler_of(thing: Scheduler | Schedule) -> _Sampler:
    rows = _SAMPLERS.values()
    return next(row for row in rows if isinstance(thing, (row.config, row.schedule)))
