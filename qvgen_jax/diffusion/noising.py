"""How a clip is noised in training: by the process that the pipeline's sampler undoes."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from qvgen_jax.diffusion import flow, v_prediction
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.errors import UserError

Noising = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array, jax.Array]]
"""`(key, clean, noise) -> (noisy, timestep, velocity)` of one clip.

The timestep is a float32 scalar, 0 (clean) to 1000 (noise); the velocity is the ground truth that
the model's prediction stands for.
"""


def training_noise(scheduler: Scheduler, train: Mapping) -> Noising:
    """Flow matching for Wan, the variance-preserving process of v-prediction for CogVideoX.

    Args:
        scheduler: the pipeline's.
        train: the `train` section of the config; its `shift` belongs to flow matching.

    Raises:
        UserError: a `shift` is missing, or has nothing to act on.
    """
    if isinstance(scheduler, v_prediction.VPredictionConfig):
        if "shift" in train:
            raise UserError(
                f"train.shift={train['shift']} belongs to flow matching, and this model's "
                f"{scheduler.class_name} is another process; use one of configs/cogvideox*.py"
            )
        return _v_prediction_noise(scheduler)
    if "shift" not in train:
        raise UserError("train.shift is missing, which flow matching needs; Wan's value is 1.0")
    return _flow_noise(train["shift"])


def _flow_noise(shift: float) -> Noising:
    def noising(key: jax.Array, clean: jax.Array, noise: jax.Array) -> tuple:
        sigma = flow.sample_sigmas(key, (), shift, clean.dtype)
        noisy, velocity = flow.add_noise(clean, noise, sigma), flow.velocity_target(clean, noise)
        return noisy, flow.to_timesteps(sigma), velocity

    return noising


def _v_prediction_noise(scheduler: v_prediction.VPredictionConfig) -> Noising:
    alphas_cumprod = scheduler.alphas_cumprod()

    def noising(key: jax.Array, clean: jax.Array, noise: jax.Array) -> tuple:
        timestep = v_prediction.sample_timesteps(key, (), scheduler.num_train_timesteps)
        noisy = v_prediction.add_noise(clean, noise, timestep, alphas_cumprod)
        velocity = v_prediction.velocity_target(clean, noise, timestep, alphas_cumprod)
        return noisy, timestep.astype(jnp.float32), velocity

    return noising


def noise_at(scheduler: Scheduler) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`(clean, noise, timesteps) -> noisy` of a batch at timesteps that the caller chose.

    Timesteps are float32 `[batch]`, 0 (clean) to 1000 (noise) in flow matching, to 999 in
    v-prediction.
    """
    if isinstance(scheduler, v_prediction.VPredictionConfig):
        alphas_cumprod = scheduler.alphas_cumprod()
        return lambda clean, noise, timesteps: v_prediction.add_noise(
            clean, noise, timesteps.astype(jnp.int32), alphas_cumprod
        )
    return lambda clean, noise, timesteps: flow.add_noise(
        clean, noise, timesteps / flow.NUM_TRAIN_TIMESTEPS
    )
