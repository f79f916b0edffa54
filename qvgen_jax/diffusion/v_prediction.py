"""v-prediction: the noise process of CogVideoX, and what its transformer predicts.

At timestep t the sample is `sqrt(a) * latents + sqrt(1 - a) * noise` with `a = alphas_cumprod[t]`;
the model predicts the velocity `sqrt(a) * noise - sqrt(1 - a) * latents` (Salimans and Ho, arXiv
2202.00512). Timesteps are whole numbers from 0 (nearly clean) to 999 (noise alone, a = 0).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.config_fields import Positive, Range, check_fields, refusal
from qvgen_jax.diffusion.scheduler_config import FILE, Levels, check_options, check_steps

_SUPPORTED = {
    "prediction_type": ("v_prediction",),
    "timestep_spacing": ("trailing",),
    "beta_schedule": ("scaled_linear",),
    "trained_betas": (None,),
}
_REQUIRED = ("_class_name", "prediction_type", "timestep_spacing")  # diffusers' defaults differ

_Beta = Annotated[float, Range(above=0, below=1)]  # the share of noise that a timestep adds


@dataclass(frozen=True)
class VPredictionConfig:
    """The noise process in a CogVideoX `scheduler_config.json`; each sampler has its subclass.

    `clip_sample` is not among the fields: diffusers' CogVideoX schedulers never read it.
    """

    num_train_timesteps: Levels = 1000
    beta_start: _Beta = 0.00085
    beta_end: _Beta = 0.012
    snr_shift_scale: Positive = 3.0
    rescale_betas_zero_snr: bool = False
    set_alpha_to_one: bool = True

    class_name: ClassVar[str]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Self:
        """Reads diffusers' fields.

        Raises:
            UserError: the scheduler is another one or uses an option that is not implemented, or
                a value is not of its kind or range.
        """
        supported = {"_class_name": (cls.class_name,), **_SUPPORTED}
        check_options(fields, supported, _REQUIRED, "use the settings published with CogVideoX")
        config = cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})
        check_fields(config, FILE)
        if config.beta_start > config.beta_end:
            expected = f"at most beta_end = {config.beta_end}"
            raise refusal("beta_start", config.beta_start, FILE, expected)
        return config

    def alphas_cumprod(self) -> np.ndarray:
        """Share of the latents in the sample's variance, float64 `[num_train_timesteps]`."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        alphas = np.cumprod(1 - betas)
        alphas = alphas / (self.snr_shift_scale + (1 - self.snr_shift_scale) * alphas)
        if not self.rescale_betas_zero_snr:
            return alphas
        roots = np.sqrt(alphas)
        first, last = roots[0], roots[-1]
        return ((roots - last) * (first / (first - last))) ** 2


class TrailingSteps(NamedTuple):
    """Where the steps of a trajectory start and end, each `[steps]`.

    Attributes:
        timesteps: int64, from 999 down.
        start: float64, alphas_cumprod at the timesteps.
        end: float64, alphas_cumprod where each step ends.
        final: whether the step ends beyond timestep 0, at the clean latents.
    """

    timesteps: np.ndarray
    start: np.ndarray
    end: np.ndarray
    final: np.ndarray


def trailing_steps(config: VPredictionConfig, steps: int) -> TrailingSteps:
    """diffusers' "trailing" timesteps, which start at noise alone.

    Raises:
        UserError: `steps` is not a whole number from 1 to the number of training timesteps.
    """
    count = config.num_train_timesteps
    check_steps(steps, count)
    # diffusers' arange; for some counts (61, 103...) its rounding adds a step at timestep -1.
    timesteps = np.round(np.arange(count, 0, -count / steps)[:steps]).astype(np.int64) - 1
    # A step ends at t - count // steps, not at the next timestep: of 7 steps the first goes from
    # 999 to 857, the second starts at 856, and the last ends at 0, not beyond. So do diffusers'.
    ends = timesteps - count // steps
    alphas, final = config.alphas_cumprod(), ends < 0
    clean = 1.0 if config.set_alpha_to_one else alphas[0]
    return TrailingSteps(timesteps, alphas[timesteps], np.where(final, clean, alphas[ends]), final)


def _factors(alphas_cumprod: jax.Array, timesteps: jax.Array, like: jax.Array):
    """Shares of latents and noise in amplitude, float32, broadcasting against `like`."""
    alpha = jnp.asarray(alphas_cumprod, jnp.float32)[timesteps]
    alpha = alpha.reshape(alpha.shape + (1,) * (like.ndim - alpha.ndim))
    return jnp.sqrt(alpha), jnp.sqrt(1 - alpha)


def add_noise(
    latents: jax.Array, noise: jax.Array, timesteps: jax.Array, alphas_cumprod: jax.Array
) -> jax.Array:
    """`sqrt(a) latents + sqrt(1 - a) noise`.

    Args:
        latents: `[batch, ...]`, as `noise`.
        timesteps: int32 `[batch]` or scalar.
        alphas_cumprod: `[num_train_timesteps]`, from the config.
    """
    signal, spread = _factors(alphas_cumprod, timesteps, latents)
    return signal * latents + spread * noise


def velocity_target(
    latents: jax.Array, noise: jax.Array, timesteps: jax.Array, alphas_cumprod: jax.Array
) -> jax.Array:
    """What the model should predict: `sqrt(a) noise - sqrt(1 - a) latents`."""
    signal, spread = _factors(alphas_cumprod, timesteps, latents)
    return signal * noise - spread * latents


def denoise(
    noisy: jax.Array, velocity: jax.Array, timesteps: jax.Array, alphas_cumprod: jax.Array
) -> jax.Array:
    """The clean latents that a velocity implies: `sqrt(a) noisy - sqrt(1 - a) velocity`."""
    signal, spread = _factors(alphas_cumprod, timesteps, noisy)
    return signal * noisy - spread * velocity


def sample_timesteps(
    key: jax.Array, shape: tuple[int, ...] = (), num_train_timesteps: int = 1000
) -> jax.Array:
    """Timesteps for training, int32 `shape`: uniform on 0, 1, ... 999, as CogVideoX was trained."""
    return jax.random.randint(key, shape, 0, num_train_timesteps)
