"""The networks of a pipeline, each with its parameters, as jitted calls.

Compilation is cached on the network's description and the shapes of the arguments, never on the
parameters: a teacher, and a student at two moments of its training, share what they can.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.autoencoders import cogvideox as cogvideox_vae
from qvgen_jax.autoencoders import wan as wan_vae
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.diffusion.guidance import Guidance, guided
from qvgen_jax.diffusion.schedulers import Schedule, sample, sampler_of
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.placement import run_where
from qvgen_jax.quant.clips import countdown
from qvgen_jax.quant.time_table import check_timesteps
from qvgen_jax.text.t5 import T5Config


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
        self.check_schedule(schedule)
        two_passes, scales = _guiding(guidance, schedule)
        if (scales == 1).all():
            negative_embeds = None
        form = (two_passes, self._asks_twice(negative_embeds))
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
        self.check_schedule(schedule)
        sampler = sampler_of(schedule, step_noise)
        two_passes, scales = _guiding(guidance, schedule)
        if (scales == 1).all():
            negative_embeds = None
        form = (two_passes, self._asks_twice(negative_embeds))
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

    def _asks_twice(self, negative_embeds: jax.Array | None) -> bool:
        # PyTorch's Wan pipeline calls its transformer once per prompt, CogVideoX's once for both.
        return negative_embeds is not None and isinstance(self.config, WanConfig)


def _guiding(guidance: Guidance | float, schedule: Schedule) -> tuple[bool, np.ndarray]:
    """Whether in two passes, and every step's scale."""
    if not isinstance(guidance, Guidance):
        guidance = Guidance(float(guidance))
    return guidance.two_passes, guidance.scales(schedule.timesteps)


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
                index = countdown(2 * step + negative if twice else step + 0 * negative)
            return network(latents, timesteps, text_embeds, gate=gate, clip_index=index)

        batch = len(latents)
        guide = guided(model, text_embeds, negative_embeds, scales, **passes)
        return guide(latents, timestep, step - first)

    return predict


@dataclass(frozen=True, eq=False)
class VAE:
    """A video autoencoder; latents here are the PyTorch VAE's own, not normalised."""

    config: WanVAEConfig | CogVideoXVAEConfig
    graphdef: nnx.GraphDef
    states: tuple[dict, ...]

    def encode(self, video: jax.Array, tiling: Tiling | bool = False) -> jax.Array:
        """The posterior mean, float32 `[b, 1 + n, H/8, W/8, z]`, of video `[b, 1 + 4n, H, W, 3]`.

        Args:
            tiling: tiles in space, which need less memory; True for diffusers' `enable_tiling()`.

        Raises:
            UserError: the video is not float in [-1, 1], or its size does not divide.
        """
        return self.posterior(video, tiling)[0]

    def posterior(
        self, video: jax.Array, tiling: Tiling | bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, not normalised."""
        if video.ndim != 5 or not jnp.issubdtype(video.dtype, jnp.floating):
            raise UserError(
                f"video is {video.dtype} {list(video.shape)}, expected float in [-1, 1] of "
                "[batch, frames, height, width, 3]; for uint8 frames pass frames / 127.5 - 1"
            )
        return _encode(self.graphdef, self._tiles(tiling), self.states, jnp.asarray(video))

    def decode(self, latents: jax.Array, tiling: Tiling | bool = False) -> jax.Array:
        """Video float32 in [-1, 1], `[b, 1 + 4n, 8h, 8w, 3]`, of latents `[b, 1 + n, h, w, z]`.

        Where n is odd, CogVideoX's VAE gives three frames more.
        """
        return _decode(self.graphdef, self._tiles(tiling), self.states, jnp.asarray(latents))

    def normalize(self, mean: jax.Array, logvar: jax.Array | None = None):
        """To the transformer's space; with `logvar`, both."""
        return self._family.normalize(self.config, mean, logvar)

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """From the transformer's space."""
        return self._family.denormalize(self.config, latents)

    @property
    def frame_unit(self) -> int:
        """A video of 1 plus a multiple of this comes back with as many frames."""
        # CogVideoX's VAE works on pairs of latent frames, and a lone one after others becomes four.
        pairs = 1 if self._family is wan_vae else 2
        return pairs * self.config.temporal_factor

    @property
    def _family(self) -> ModuleType:
        return wan_vae if isinstance(self.config, WanVAEConfig) else cogvideox_vae

    def _tiles(self, tiling: Tiling | bool) -> Tiling | None:
        return (self.config.default_tiling if tiling is True else tiling) or None


@partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef, tiling, states, video):
    return nnx.merge(graphdef, *states).encode(video, tiling)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(graphdef, tiling, states, latents):
    return nnx.merge(graphdef, *states).decode(latents, tiling)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 or UMT5 encoder, with weights in float or in int8."""

    config: T5Config
    graphdef: nnx.GraphDef
    states: tuple[dict, ...]

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states `[batch, tokens, d_model]` of int32 ids; zero wherever the mask is.

        A mask of ones is PyTorch's CogVideoX, whose text has none.
        """
        ids, mask = jnp.asarray(token_ids), jnp.asarray(mask)
        return run_where(partial(_encode_text, self.graphdef), self.states, ids, mask)


@partial(jax.jit, static_argnums=0)
def _encode_text(graphdef, states, token_ids, mask):
    hidden = nnx.merge(graphdef, *states)(token_ids, mask)
    return jnp.where(mask[..., None] > 0, hidden, jnp.zeros((), hidden.dtype))


def fingerprint(*networks: Transformer | VAE | TextEncoder) -> str:
    """Changes with the networks' configuration or weights, not with time.

    Of each array the first 4096 elements are read: retrained weights differ everywhere.
    """
    digest = hashlib.sha256()
    for network in networks:
        digest.update(repr(network.config).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(network.states):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.asarray(leaf.ravel()[:4096]).tobytes())
    return digest.hexdigest()[:16]
