"""UniPC, the sampler of Wan, for flow prediction: steps of precomputed coefficients.

Zhao et al., "UniPC: A Unified Predictor-Corrector Framework" (arXiv 2302.04867), with the choices
of diffusers' `UniPCMultistepScheduler`. Every update there is linear in the current sample, the
last corrected sample and the clean latents predicted so far, and its factors depend on the noise
levels alone. So they are computed once, in numpy float64, and a step is a few weighted sums.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.config_fields import Range, check_fields
from qvgen_jax.diffusion.flow import denoise, shift_sigma
from qvgen_jax.diffusion.scheduler_config import FILE, Levels, Shift, check_options, check_steps

_SUPPORTED = {
    "_class_name": ("UniPCMultistepScheduler",),
    "prediction_type": ("flow_prediction",),
    "use_flow_sigmas": (True,),
    "predict_x0": (True,),
    "solver_order": (1, 2, 3),
    "solver_type": ("bh2",),  # bh1 is not finite at a final noise level of zero
    "lower_order_final": (True,),
    "final_sigmas_type": ("zero",),
    "thresholding": (False,),
    "use_dynamic_shifting": (False,),
    "use_karras_sigmas": (False,),
    "use_exponential_sigmas": (False,),
    "use_beta_sigmas": (False,),
    "shift_terminal": (None,),
    "solver_p": (None,),
}
_REQUIRED = ("prediction_type", "use_flow_sigmas")  # their absence means something unsupported


@dataclass(frozen=True)
class UniPCConfig:
    """The part of `scheduler_config.json` that flow sampling depends on."""

    num_train_timesteps: Levels = 1000
    flow_shift: Shift = 1.0
    solver_order: Annotated[int, Range(least=1, below=20)] = 2
    disable_corrector: tuple[Annotated[int, Range(least=0)], ...] = ()

    @classmethod
    def from_json(cls, config: Mapping) -> "UniPCConfig":
        """Reads diffusers' fields.

        Raises:
            UserError: the scheduler is another one or uses an option that is not implemented, or
                a value is not of its kind or range.
        """
        remedy = "use Wan's UniPCMultistepScheduler settings"
        check_options(config, _SUPPORTED, _REQUIRED, remedy)
        corrector = config.get("disable_corrector")
        corrector = () if corrector is None else corrector
        parsed = cls(
            num_train_timesteps=config.get("num_train_timesteps", 1000),
            flow_shift=config.get("flow_shift", 1.0),
            solver_order=config.get("solver_order", 2),
            disable_corrector=tuple(corrector) if isinstance(corrector, list) else corrector,
        )
        check_fields(parsed, FILE)
        return parsed


class UniPCSchedule(NamedTuple):
    """What one trajectory needs to know, one row per step (numpy float32).

    Attributes:
        timesteps: `[steps]`, what the model reads: whole numbers, truncated as diffusers does.
        sigmas: `[steps + 1]`, the noise levels; the last is 0.
        correct: `[steps, 3 + order]`, factors of (sample, last sample, new clean latents, and the
            clean latents of earlier steps, newest first) in the corrected sample.
        predict: `[steps, 1 + order]`, factors of (corrected sample, clean latents, newest first)
            in the next sample.
    """

    timesteps: np.ndarray
    sigmas: np.ndarray
    correct: np.ndarray
    predict: np.ndarray


def _noise_levels(config: UniPCConfig, steps: int) -> tuple[np.ndarray, np.ndarray]:
    sigmas = np.linspace(1, 1 / config.num_train_timesteps, steps + 1)[:-1]
    sigmas = shift_sigma(sigmas, config.flow_shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # at exactly 1 the log signal-to-noise ratio is infinite
    timesteps = np.trunc(sigmas * config.num_train_timesteps)
    return timesteps, np.append(sigmas, 0.0).astype(np.float32)


def _linear_system(ratios: list[float], h: float) -> tuple[np.ndarray, np.ndarray]:
    """`(R, b)` of UniPC for the data prediction, with B(h) = e^-h - 1 (bh2)."""
    order = len(ratios) + 1
    points = np.array([*ratios, 1.0])
    matrix = np.stack([points**power for power in range(order)])
    first = math.expm1(-h)
    phi, factorial, rhs = first / -h - 1, 1, []
    for i in range(1, order + 1):
        rhs.append(phi * factorial / first)
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    return matrix, np.array(rhs)


def _update(sigmas: np.ndarray, end: int, order: int, corrector: bool):
    """Factors of the step to `sigmas[end]`: (start sample, new clean latents, earlier ones...)."""
    alphas = 1 - sigmas
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas) - np.log(sigmas)
    start = end - 1
    h = log_snr[end] - log_snr[start]
    ratios = [(log_snr[start - i] - log_snr[start]) / h for i in range(1, order)]
    matrix, rhs = _linear_system(ratios, h)
    if corrector:
        rho = np.array([0.5]) if order == 1 else np.linalg.solve(matrix, rhs)
        rho, rho_new = rho[:-1], rho[-1]
    else:  # one point fewer: the end's prediction is not known yet
        rho = np.array([0.5]) if order == 2 else np.linalg.solve(matrix[:-1, :-1], rhs[:-1])
        rho_new = 0.0
    gain = -alphas[end] * math.expm1(-h)
    earlier = [gain * r / ratio for r, ratio in zip(rho, ratios, strict=True)]
    new = gain * rho_new
    newest = gain - sum(earlier) - new
    return sigmas[end] / sigmas[start], new, [newest, *earlier]


def unipc_schedule(config: UniPCConfig, steps: int) -> UniPCSchedule:
    """The schedule of a trajectory of `steps` model calls.

    Raises:
        UserError: `steps` is not a positive whole number.
    """
    check_steps(steps)
    timesteps, sigmas = _noise_levels(config, steps)
    levels = sigmas.astype(np.float64)  # rounded first: diffusers takes 1 - sigma in float32
    order = config.solver_order
    orders = [min(order, steps - i, i + 1) for i in range(steps)]
    correct = np.zeros((steps, 3 + order))
    predict = np.zeros((steps, 1 + order))
    for i in range(steps):
        if i == 0 or i - 1 in config.disable_corrector:
            correct[i, 0] = 1
        else:
            last, new, earlier = _update(levels, i, orders[i - 1], corrector=True)
            correct[i, 1:3] = last, new
            correct[i, 3 : 3 + len(earlier)] = earlier
        sample, _, clean = _update(levels, i + 1, orders[i], corrector=False)
        predict[i, : 1 + len(clean)] = [sample, *clean]
    return UniPCSchedule(
        timesteps.astype(np.float32), sigmas, correct.astype(np.float32), predict.astype(np.float32)
    )


def start(noise: jax.Array, schedule: UniPCSchedule) -> tuple[jax.Array, ...]:
    """The carry before the first step: (sample, last corrected sample, clean latents so far)."""
    history = jnp.zeros((schedule.predict.shape[1] - 1, *noise.shape), jnp.float32)
    return noise, noise, history


def rows(schedule: UniPCSchedule) -> tuple:
    """What `advance` is told, arrays `[steps, ...]`."""
    steps = np.arange(len(schedule.timesteps), dtype=np.int32)
    return steps, schedule.timesteps, schedule.sigmas[:-1], schedule.correct, schedule.predict


def advance(
    velocity_fn: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    carry: tuple[jax.Array, ...],
    row: tuple,
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """One step: the next carry, and the clean latents that the model saw in this one.

    Args:
        velocity_fn: `(latents, timestep, step) -> velocity`; timestep is a float32 scalar, step the
            int32 index of the call.
        carry: of `start`, or of the step before.
        row: of `rows`; its values may be traced.
    """
    sample, last_sample, history = carry
    step, timestep, sigma, correct, predict = row
    velocity = velocity_fn(sample, timestep, step).astype(jnp.float32)
    clean = denoise(sample, velocity, sigma)
    corrected = correct[0] * sample + correct[1] * last_sample + correct[2] * clean
    corrected += _weighted_sum(correct[3:], history)
    history = jnp.concatenate([clean[None], history[:-1]])
    following = predict[0] * corrected + _weighted_sum(predict[1:], history)
    return (following, corrected, history), clean


def _weighted_sum(factors: jax.Array, arrays: jax.Array) -> jax.Array:
    # Not a dot product: on accelerators that would round its inputs to bf16 by default.
    return sum(factors[i] * arrays[i] for i in range(arrays.shape[0]))
