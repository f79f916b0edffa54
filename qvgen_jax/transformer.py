"""A pipeline's transformer with its parameters: a call, and the trajectories that samplers take.

Compilation is cached on the network's description and the shapes of the arguments, never on the
parameters: a teacher, and a student at two moments of its training, share what they can.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.diffusion.guidance import Guidance, guided
from qvgen_jax.diffusion.schedulers import Schedule, sample, sampler_of
from qvgen_jax.models import TransformerConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.placement import run_where
from qvgen_jax.quant.clips import countdown
from qvgen_jax.quant.time_table import check_timesteps


class Step(NamedTuple):
    """Where a trajectory is after one of its steps.

    Attributes:
        latents: float32 `[batch, frames, height, width, channels]`; after the last step, the
            result.
        clean: the same shape: what the model saw behind the noise in this step.
    """

    latents: jax.Array
    clean: jax.Array


@dataclass(frozen=True, eq=False)
class Transformer:
    """A video transformer, full precision, fake-quantized or packed.

    Attributes:
        config: its sizes.
        graphdef: of a `WanTransformer` or a `CogVideoXTransformer`, from `nnx.split`.
        states: what `nnx.merge` needs beside it: `(params,)`, or `(params, levels)` if quantized.
        gate: float32 `[rank]` of the low-rank branch; None where there is no branch.
        table_steps: the numbers of steps that its time table was made for, if it has one.
    """

    config: TransformerConfig
    graphdef: nnx.GraphDef
    states: tuple[dict, ...]
    gate: jax.Array | None = None
    table_steps: tuple[int, ...] = ()

    def __call__(
        self,
        latents: jax.Array,
        timesteps: jax.Array,
        text_embeds: jax.Array,
        *,
        clip_index: jax.Array | None = None,
    ) -> jax.Array:
        """The predicted velocity, in the shape and type of `latents`.

        In Wan it is `noise - latents`, in CogVideoX that of v-prediction.

        Args:
            latents: `[batch, frames, height, width, channels]`, noisy, normalised.
            timesteps: `[batch]`, 0 (clean) to 1000 (noise). A network with a time table takes the
                nearest of its timesteps, however far it is: `check_schedule` tells.
            text_embeds: `[batch, tokens, text_dim]` of `Pipeline.encode_prompt`.
            clip_index: int32 `[batch]`; chosen by the timesteps if None.
        """
        args = (jnp.asarray(latents), jnp.asarray(timesteps), jnp.asarray(text_embeds))
        arguments = (self.states, self.gate, *args, clip_index)
        return run_where(partial(_velocity, self.graphdef), *arguments)

    def check_schedule(self, schedule: Schedule) -> None:
        """Refuses a schedule with timesteps that the network's time table, if any, does not hold.

        Raises:
            UserError: it names the numbers of steps that the table was made for.
        """
        table = self.states[0].get("timestep_table")
        if table is not None:
            check_timesteps(schedule.timesteps, np.asarray(table), self.table_steps)

    def sample(
        self,
        noise: jax.Array,
        text_embeds: jax.Array,
        negative_embeds: jax.Array | None,
        guidance: Guidance | float,
        schedule: Schedule,
        step_noise: jax.Array | None = None,
    ) -> jax.Array:
        """Latents from noise.

        Args:
            noise: float32 `[batch, frames, height, width, channels]`.
            text_embeds: `[batch, tokens, text_dim]`.
            negative_embeds: as `text_embeds`; None samples unguided.
            guidance: or its constant scale alone.
            schedule: from `make_schedule`.
            step_noise: PRNG keys `[batch]` for a sampler that adds noise in every step.

        Raises:
            UserError: the guidance does not fit the schedule, `step_noise` is missing, or the
                schedule visits timesteps that a time table does not hold.
        """
        form, scales, negative_embeds = self._guiding(negative_embeds, guidance, schedule)
        return run_where(
            partial(_sample, self.graphdef, form, bool((scales == 1).any())),
            self.states,
            self.gate,
            noise,
            text_embeds,
            negative_embeds,
            scales,
            schedule,
            step_noise,
        )

    def steps(
        self,
        noise: jax.Array,
        text_embeds: jax.Array,
        negative_embeds: jax.Array | None,
        guidance: Guidance | float,
        schedule: Schedule,
        step_noise: jax.Array | None = None,
    ) -> Iterator[Step]:
        """The trajectory of `sample`, step by step; between two of them it may be left.

        A step is a program of its own, for any number of steps: XLA may sum in another order than
        within the scan, so that latents agree with `sample` to rounding. Quantizers round once
        more: over many steps a low-bit trajectory may leave that of `sample` (docs/serve.md).

        Args: as `sample`.

        Raises:
            UserError: as `sample`, before the first step.
        """
        sampler = sampler_of(schedule, step_noise)
        form, scales, negative_embeds = self._guiding(negative_embeds, guidance, schedule)
        carry = sampler.start(jnp.asarray(noise, jnp.float32), schedule)
        for *row, scale in zip(*sampler.rows(schedule), scales, strict=True):
            carry, clean = run_where(
                partial(_step, self.graphdef, form, sampler),
                self.states,
                self.gate,
                carry,
                row,
                text_embeds,
                None if scale == 1 else negative_embeds,
                scale[None],
                step_noise,
            )
            yield Step(carry[0], clean)

    def _guiding(
        self, negative_embeds: jax.Array | None, guidance: Guidance | float, schedule: Schedule
    ) -> tuple[tuple[bool, bool], np.ndarray, jax.Array | None]:
        """The form of `_prediction`, every step's scale, and the negative if any step wants it.

        Raises:
            UserError: the guidance does not fit the schedule, or the schedule a time table.
        """
        self.check_schedule(schedule)
        if not isinstance(guidance, Guidance):
            guidance = Guidance(float(guidance))
        scales = guidance.scales(schedule.timesteps)
        if (scales == 1).all():
            negative_embeds = None
        # PyTorch's Wan pipeline calls its transformer once per prompt, CogVideoX's once for both.
        twice = negative_embeds is not None and isinstance(self.config, WanConfig)
        return (guidance.two_passes, twice), scales, negative_embeds


@partial(jax.jit, static_argnums=0)
def _velocity(graphdef, states, gate, latents, timesteps, text_embeds, clip_index):
    model = nnx.merge(graphdef, *states)
    return model(latents, timesteps, text_embeds, gate=gate, clip_index=clip_index)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _sample(
    graphdef,
    form,
    skips,
    states,
    gate,
    noise,
    text_embeds,
    negative_embeds,
    scales,
    schedule,
    step_noise,
):
    network = nnx.merge(graphdef, *states)
    predict = _prediction(network, form, gate, text_embeds, negative_embeds, scales, skips=skips)
    return sample(predict, noise, schedule, step_noise)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(
    graphdef, form, sampler, states, gate, carry, row, text_embeds, negative_embeds, scale, noise
):
    network, first = nnx.merge(graphdef, *states), row[0]
    predict = _prediction(network, form, gate, text_embeds, negative_embeds, scale, first)
    return sampler.step(predict, carry, row, noise)


def _prediction(
    network: nnx.Module,
    form: tuple[bool, bool],
    gate: jax.Array | None,
    text_embeds: jax.Array,
    negative_embeds: jax.Array | None,
    scales: jax.Array,
    first: jax.Array | int = 0,
    skips: bool = False,
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The function `(latents, timestep, step) -> prediction` that a sampler calls.

    Args:
        form: whether guidance takes two passes, and whether PyTorch calls the network twice.
        scales: of the steps from `first` on.
    """
    two_passes, twice = form
    counts = network.clip_mode == "countdown"
    # In two passes a row does not know which prompt is its own.
    passes = {"two_passes": two_passes and not (counts and twice), "skips": skips}

    def predict(latents: jax.Array, timestep: jax.Array, step: jax.Array) -> jax.Array:
        def model(latents: jax.Array, timesteps: jax.Array, text_embeds: jax.Array) -> jax.Array:
            index = None
            if counts:
                negative = jnp.arange(len(latents)) // batch  # those rows come second
                calls = 2 * step + negative if twice else step + 0 * negative
                index = countdown(calls, network.buckets)
            return network(latents, timesteps, text_embeds, gate=gate, clip_index=index)

        batch = len(latents)
        guide = guided(model, text_embeds, negative_embeds, scales, **passes)
        return guide(latents, timestep, step - first)

    return predict
