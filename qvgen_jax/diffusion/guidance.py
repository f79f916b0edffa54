"""Classifier-free guidance: away from what the model predicts without the prompt.

`without + scale * (with - without)` (Ho and Salimans, arXiv 2207.12598); the scale is a function of
the step. Where it is exactly 1 nothing is left of `without`, and it is not computed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.errors import UserError


@dataclass(frozen=True)
class Guidance:
    """How a trajectory is guided.

    Attributes:
        scale: 1 for none.
        dynamic: CogVideoX's `use_dynamic_cfg`: between 1 and `1 + scale`, a function of the
            timestep.
        two_passes: one model call after the other instead of one on both: the activations of half
            the batch, and the same numbers to rounding.
        unguided_steps: so many last steps run without guidance, at half the price.
    """

    scale: float = 1.0
    dynamic: bool = False
    two_passes: bool = False
    unguided_steps: int = 0

    def scales(self, timesteps: np.ndarray) -> np.ndarray:
        """The scale of every step, float32 `[steps]`.

        Args:
            timesteps: `[steps]`, of the schedule.

        Raises:
            UserError: more unguided steps than steps, or fewer than none.
        """
        steps = len(timesteps)
        if not 0 <= self.unguided_steps <= steps:
            raise UserError(
                f"unguided_steps is {self.unguided_steps}, expected 0 to {steps}, the number of "
                "steps"
            )
        scales = np.full(steps, self.scale, np.float64)
        if self.dynamic:
            scales[:] = [dynamic_scale(self.scale, float(t), steps) for t in timesteps]
        scales[steps - self.unguided_steps :] = 1.0
        return scales.astype(np.float32)


def own_guidance(
    defaults: Mapping[str, Any], scale: float | None = None, steps: int | None = None
) -> Guidance:
    """A folder's own guidance, or another scale of it, or for another number of steps.

    Args:
        defaults: reads `guidance_scale`, `unguided_steps` and `steps`.
        scale: instead of the folder's.
        steps: of a trajectory; the last ones without guidance are in proportion to the folder's.
    """
    scale = defaults["guidance_scale"] if scale is None else scale
    unguided = defaults["unguided_steps"]
    if steps is not None:
        unguided = round(unguided / defaults["steps"] * steps)
    return Guidance(scale, unguided_steps=unguided)


def dynamic_scale(scale: float, timestep: float, steps: int) -> float:
    """`1 + scale * (1 - cos(pi * ((steps - timestep) / steps)^5)) / 2`.

    As diffusers' CogVideoX pipeline computes it: a timestep, up to 999, is subtracted from a number
    of steps. So the scale rises as a cosine only where timesteps are below `steps`; before, it
    swings between its bounds.
    """
    progress = (steps - timestep) / steps
    return 1 + scale * (1 - math.cos(math.pi * progress**5)) / 2


def guided(
    model: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    text_embeds: jax.Array,
    negative_embeds: jax.Array | None,
    scales: jax.Array,
    *,
    two_passes: bool = False,
    skips: bool = False,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function `(latents, timestep, step) -> prediction` that a sampler calls.

    Args:
        model: `(latents, timesteps [batch], text_embeds) -> prediction`, each row by itself.
        text_embeds: `[batch, tokens, dim]`.
        negative_embeds: as `text_embeds`; None for no guidance.
        scales: float32 `[steps]`; traced.
        two_passes: see `Guidance`.
        skips: some scale is 1, and the negative prompt shall not be computed there; the model is
            then compiled twice.
    """

    def with_text(latents: jax.Array, timestep: jax.Array) -> jax.Array:
        return model(latents, jnp.full(len(latents), timestep), text_embeds)

    def both_at_once(latents: jax.Array, timestep: jax.Array) -> tuple[jax.Array, ...]:
        # One call: the rows are independent, and so is their choice of clips.
        texts = jnp.concatenate([text_embeds, negative_embeds])
        latents = jnp.concatenate([latents, latents])
        return tuple(jnp.split(model(latents, jnp.full(len(latents), timestep), texts), 2))

    def one_by_one(latents: jax.Array, timestep: jax.Array) -> tuple[jax.Array, ...]:
        # A loop, because of two calls side by side the compiler might keep all activations.
        timesteps = jnp.full(len(latents), timestep)
        texts = jnp.stack([text_embeds, negative_embeds])
        return tuple(jax.lax.map(lambda text: model(latents, timesteps, text), texts))

    both = one_by_one if two_passes else both_at_once

    def predict(latents: jax.Array, timestep: jax.Array, step: jax.Array) -> jax.Array:
        if negative_embeds is None:
            return with_text(latents, timestep)
        scale = scales[step]

        def combined(latents: jax.Array, timestep: jax.Array) -> jax.Array:
            prediction, without = both(latents, timestep)
            return without + scale * (prediction - without)

        if not skips:
            return combined(latents, timestep)
        return jax.lax.cond(scale != 1, combined, with_text, latents, timestep)

    return predict
