"""The samplers by the names that pipeline folders call them.

scheduler = scheduler_from_json(fields)            # of scheduler/scheduler_config.json
schedule = make_schedule(scheduler, 50)            # numpy arrays, one row per model call
latents = sample(model, noise, schedule, keys)     # a scan, under jit

Each is three functions: what its steps carry at first, what each of them is told, and the step. The
scan takes all steps in one program; `Transformer.steps` takes them one by one.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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


class Sampler(NamedTuple):
    """One sampler.

    Attributes:
        config: what a `scheduler_config.json` is read into.
        schedule: what `make_schedule` gives: numpy arrays, a row per step.
        make_schedule: `(config, steps) -> schedule`.
        start: `(noise, schedule) -> carry`, a tuple whose first array is the sample.
        rows: `schedule -> arrays [steps, ...]`, a tuple; the steps' indices come first.
        advance: `(model, carry, row) -> (carry, clean)`, a step; `clean` are the latents that the
            model saw behind the noise in this step.
        stochastic: whether `advance` takes `step_noise` as well.
    """

    config: type
    schedule: type
    make_schedule: Callable
    start: Callable
    rows: Callable
    advance: Callable
    stochastic: bool = False

    def step(self, model: Callable, carry: tuple, row: Any, step_noise: Any) -> tuple:
        """`advance` with the noise, if the sampler wants it."""
        return self.advance(model, carry, row, *((step_noise,) if self.stochastic else ()))


_SAMPLERS = {
    "UniPCMultistepScheduler": Sampler(
        unipc.UniPCConfig,
        unipc.UniPCSchedule,
        unipc.unipc_schedule,
        unipc.start,
        unipc.rows,
        unipc.advance,
    ),
    "FlowMatchEulerDiscreteScheduler": Sampler(
        flow_euler.FlowEulerConfig,
        flow_euler.FlowEulerSchedule,
        flow_euler.flow_euler_schedule,
        flow_euler.start,
        flow_euler.rows,
        flow_euler.advance,
    ),
    "CogVideoXDDIMScheduler": Sampler(
        cogvideox_ddim.CogVideoXDDIMConfig,
        cogvideox_ddim.CogVideoXDDIMSchedule,
        cogvideox_ddim.cogvideox_ddim_schedule,
        cogvideox_ddim.start,
        cogvideox_ddim.rows,
        cogvideox_ddim.advance,
    ),
    "CogVideoXDPMScheduler": Sampler(
        cogvideox_dpm.CogVideoXDPMConfig,
        cogvideox_dpm.CogVideoXDPMSchedule,
        cogvideox_dpm.cogvideox_dpm_schedule,
        cogvideox_dpm.start,
        cogvideox_dpm.rows,
        cogvideox_dpm.advance,
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


def shifted(scheduler: Scheduler, flow_shift: float | None) -> Scheduler:
    """The scheduler with another shift of its noise levels; itself for None.

    Raises:
        UserError: it samples no flow, or the shift is no number above 0, below 1000.
    """
    if flow_shift is None:
        return scheduler
    if not hasattr(scheduler, "flow_shift"):
        raise UserError(
            f"flow_shift is {flow_shift}, but this pipeline's {type(scheduler).__name__} "
            "does not sample a flow; leave it away"
        )
    number = isinstance(flow_shift, int | float | np.number)
    if not number or isinstance(flow_shift, bool) or not 0 < flow_shift < 1000:
        raise UserError(f"flow_shift is {flow_shift!r}, expected a number above 0, below 1000")
    return dataclasses.replace(scheduler, flow_shift=float(flow_shift))


def make_schedule(scheduler: Scheduler, steps: int) -> Schedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a whole number that the sampler can do.
    """
    return _row_of(scheduler).make_schedule(scheduler, steps)


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
            (see `cogvideox_dpm.advance`); the others leave it aside.

    Raises:
        UserError: a stochastic sampler without `step_noise`.
    """
    sampler = sampler_of(schedule, step_noise)

    def body(carry: tuple, row: Any) -> tuple[tuple, None]:
        return sampler.step(model, carry, row, step_noise)[0], None

    first = sampler.start(noise.astype(jnp.float32), schedule)
    (latents, *_), _ = jax.lax.scan(body, first, sampler.rows(schedule))
    return latents


def sampler_of(schedule: Schedule, step_noise: jax.Array | None) -> Sampler:
    """The sampler of a schedule.

    Raises:
        UserError: a stochastic one without `step_noise`.
    """
    sampler = _row_of(schedule)
    if sampler.stochastic and step_noise is None:
        raise UserError(
            "step_noise is None, expected PRNG keys, one per video: this sampler adds noise in "
            "every step"
        )
    return sampler


def _row_of(thing: Scheduler | Schedule) -> Sampler:
    rows = _SAMPLERS.values()
    return next(row for row in rows if isinstance(thing, (row.config, row.schedule)))
