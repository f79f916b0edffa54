"""Calibration inputs: what the full-precision model sees while it samples a few prompts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qvgen_jax.diffusion.guidance import Guidance, guided
from qvgen_jax.diffusion.schedulers import Schedule, sampler_of
from qvgen_jax.errors import UserError
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.ptq.stages import in_batches, plain_network, predict


class Inputs(NamedTuple):
    """Calls of the transformer, host arrays float32.

    Attributes:
        latents: `[samples, frames, height, width, channels]`.
        timesteps: `[samples]`.
        text_embeds: `[samples, text tokens, text_dim]`.
    """

    latents: np.ndarray
    timesteps: np.ndarray
    text_embeds: np.ndarray


def sampled_inputs(
    pipe: Pipeline,
    prompts: Sequence[str],
    calibration: Mapping,
    size: Mapping,
    seed: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> Inputs:
    """Every few steps' inputs, with the prompt and without, of the pipeline's own trajectories.

    The transformer is streamed: nothing but a stage of it is on the devices.

    Args:
        pipe: full precision, its transformer's parameters in the host's memory.
        prompts: one video each.
        calibration: reads `steps` (of the sampler), `every` (which of them are kept), and
            `batch_size`.
        size: reads `num_frames`, `height`, `width` and `max_length`.
        seed: of the first video's noise; the next number for the next video.
        dtype: in which the transformer computes.
        mesh: whose devices share a batch.

    Raises:
        UserError: a size or a number of steps that the pipeline cannot do, or batches that do not
            divide over the mesh.
    """
    model, params = pipe.transformer.config, pipe.transformer.states[0]
    network, devices = plain_network(model, dtype), 1 if mesh is None else mesh.size
    seeds = [seed + number for number in range(len(prompts))]
    arrays, how, _ = pipe.start(
        prompts,
        num_frames=size["num_frames"],
        height=size["height"],
        width=size["width"],
        max_length=size["max_length"],
        steps=calibration["steps"],
        seeds=seeds,
    )

    for samples in _samples(arrays, **how):
        batch_rows(samples, calibration["batch_size"], devices)  # Told before the first step.

    def velocity(*args: jax.Array) -> jax.Array:
        rows = batch_rows(len(args[0]), calibration["batch_size"], devices)
        batches = in_batches([np.asarray(x, np.float32) for x in args], rows)
        return jnp.asarray(predict(network, model, params, batches, mesh))

    steps, every = calibration["steps"], calibration["every"]
    # Up to the last one that is kept: what follows it nobody asks for.
    kept = islice(_calls(velocity, arrays, **how), 0, steps, every)
    return Inputs(*(np.concatenate(each) for each in zip(*kept, strict=True)))


def _samples(arrays: Mapping[str, Any], guidance: Guidance, schedule: Schedule) -> set[int]:
    """How many samples the model is called with, in one step or another."""
    prompts, scales = len(arrays["text_embeds"]), guidance.scales(schedule.timesteps)
    return {prompts if _negative(arrays, scale) is None else 2 * prompts for scale in scales}


def _negative(arrays: Mapping[str, Any], scale: float) -> jax.Array | None:
    """What a step of that scale is guided away from."""
    return None if scale == 1 else arrays.get("negative_embeds")


def _calls(
    velocity: Callable, arrays: Mapping[str, Any], guidance: Guidance, schedule: Schedule
) -> Iterator[tuple]:
    """What the model is called with in every step, host arrays.

    Not compiled: the model is streamed, and what else there is of a step is nothing beside it.
    """
    noise, texts = arrays["step_noise"], arrays["text_embeds"]
    sampler, scales = sampler_of(schedule, noise), guidance.scales(schedule.timesteps)
    carry = sampler.start(jnp.asarray(arrays["noise"], jnp.float32), schedule)
    for *row, scale in zip(*sampler.rows(schedule), scales, strict=True):
        negative = _negative(arrays, scale)
        asked: list[tuple] = []

        def model(*args: jax.Array, asked: list = asked) -> jax.Array:
            asked.append(args)
            return velocity(*args)

        guide = guided(model, texts, negative, jnp.asarray([scale]))
        carry, _ = sampler.step(lambda x, t, _, guide=guide: guide(x, t, 0), carry, row, noise)
        yield tuple(np.asarray(array, np.float32) for array in asked[0])


def batch_rows(samples: int, most: int, devices: int) -> int:
    """The largest batch that divides the samples and goes over the devices.

    It has no more than `most` samples, or one for each device.

    Raises:
        UserError: there is none.
    """
    fits = [n for n in range(devices, max(most, devices) + 1, devices) if samples % n == 0]
    if not fits:
        raise UserError(
            f"{samples} samples at a time do not divide over {devices} devices; let "
            f"--config.calibration.count be a multiple of {devices}, or show this process fewer"
        )
    return fits[-1]
