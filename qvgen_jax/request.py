"""What a user may ask of `generate`, checked before anything is computed."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.errors import UserError


class Request(NamedTuple):
    """A checked request.

    Attributes:
        prompts: one per video.
        negative_prompts: one per video; empty where guidance is off.
        seeds: one per video, 0 to 2^32 - 1.
        shape: of one video's latents, (frames, height, width, channels).
        steps: model calls per video.
        guidance_scale: above 1, or 1 for none.
        latents: the noise to start from, float32 `[batch, *shape]`, or None.
    """

    prompts: list[str]
    negative_prompts: list[str]
    seeds: list[int]
    shape: tuple[int, int, int, int]
    steps: int
    guidance_scale: float
    latents: np.ndarray | None

    def noise(self) -> jax.Array:
        """The start of every video, float32 `[batch, *shape]`: a function of its seed alone."""
        if self.latents is not None:
            return jnp.asarray(self.latents)
        draws = {s: jax.random.normal(jax.random.key(s), self.shape) for s in set(self.seeds)}
        return jnp.stack([draws[seed] for seed in self.seeds])

    def step_noise(self) -> jax.Array:
        """Keys `[batch]` for samplers that add noise in every step: of the seeds, too."""
        return jnp.stack([jax.random.fold_in(jax.random.key(seed), 1) for seed in self.seeds])


MOST_STEPS = 10_000  # Ten times what any sampler was trained for: the schedule is an array of them.
LONGEST_PROMPT = 100_000
"""Characters. Text encoders read at most 512 tokens; what is longer is some other file."""


def prompt_fault(prompt: str) -> str | None:
    """What is wrong with a text for the text encoder, as the end of a sentence; None if nothing."""
    if len(prompt) > LONGEST_PROMPT:
        return f"has {len(prompt)} characters, expected at most {LONGEST_PROMPT}; shorten it"
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        return f"is not Unicode text ({error.reason}, character {error.start}); write it as UTF-8"
    return None


def prompt_list(prompts: Any, name: str = "prompts") -> list[str]:
    """One string or several as a list.

    Raises:
        UserError: no prompt at all, something that is not a string, or a string that is no text.
    """
    listed = [prompts] if isinstance(prompts, str) else list(prompts or ())
    if not listed or not all(isinstance(prompt, str) for prompt in listed):
        raise UserError(f"{name} is {prompts!r}, expected a string or a non-empty list of strings")
    for prompt in listed:
        if fault := prompt_fault(prompt):
            raise UserError(f"{name}: {prompt[:60]!r} {fault}")
    return listed


def _repeat(values: Any, count: int, name: str) -> list:
    """One value for all, or one for each of `count` prompts."""
    if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
        return [values] * count
    if len(values) != count:
        raise UserError(
            f"{len(values)} {name} for {count} prompts; give one for all, or one per prompt"
        )
    return list(values)


def whole_number(value: Any, name: str, low: int = 1, high: int = 2**31 - 1) -> int:
    """`value`, if it is a whole number in the range.

    Raises:
        UserError: it is not.
    """
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not low <= value <= high:
        raise UserError(f"{name} is {value!r}, expected a whole number from {low} to {high}")
    return int(value)


def _guidance(value: Any) -> float:
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UserError(f"guidance_scale is {value!r}, expected a number; 1 means no guidance")
    return max(float(value), 1.0)


def latent_size(
    num_frames: Any,
    height: Any,
    width: Any,
    time: int,
    unit: int,
    space: int,
    patch: tuple[int, int, int],
) -> tuple[int, int, int]:
    """Latent frames, height and width of a video's size in frames and pixels.

    Args:
        time: frames per latent frame after the first.
        unit: a multiple of `time`, and what a number of frames is 1 plus a multiple of.
        space: pixels per latent pixel.
        patch: of the transformer, in latent frames and pixels.

    Raises:
        UserError: a size that does not divide; the nearest that does is named.
    """
    frames = whole_number(num_frames, "num_frames")
    if (frames - 1) % unit:
        near = round((frames - 1) / unit) * unit + 1
        raise UserError(f"num_frames is {frames}, expected 1 plus a multiple of {unit}; use {near}")
    for name, value, unit in (
        ("height", height, space * patch[1]),
        ("width", width, space * patch[2]),
    ):
        pixels = whole_number(value, name)
        if pixels % unit:
            near = max(round(pixels / unit), 1) * unit
            raise UserError(f"{name} is {pixels}, expected a multiple of {unit}; use {near}")
    return (frames - 1) // time + 1, int(height) // space, int(width) // space


def check_request(
    prompts: Any,
    negative_prompts: Any,
    seeds: Any,
    shape: tuple[int, int, int, int],
    steps: Any,
    guidance_scale: Any,
    latents: Any,
) -> Request:
    """Checks everything but `shape`, one video's latents, which `latent_size` has checked.

    Raises:
        UserError: it names the value, what was expected and what to do.
    """
    prompts = prompt_list(prompts)
    scale = _guidance(guidance_scale)
    negatives: list[str] = []
    if scale > 1:
        negatives = _repeat(
            "" if negative_prompts is None else negative_prompts, len(prompts), "negative prompts"
        )
        negatives = prompt_list(negatives, "negative_prompts")
    # JAX would silently keep the low 32 bits of a larger seed.
    listed = [whole_number(s, "seed", 0, 2**32 - 1) for s in _repeat(seeds, len(prompts), "seeds")]
    if latents is not None:
        latents = np.asarray(latents, np.float32)
        if latents.shape != (len(prompts), *shape):
            raise UserError(
                f"latents are {list(latents.shape)}, expected {[len(prompts), *shape]}: "
                "[prompts, frames, height, width, channels] in the transformer's space; "
                "change them or num_frames, height and width"
            )
    return Request(
        prompts,
        negatives,
        listed,
        shape,
        whole_number(steps, "steps", high=MOST_STEPS),
        scale,
        latents,
    )
