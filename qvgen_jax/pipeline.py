"""From a folder and a prompt to a video: `load(path)`, then `pipe.generate(prompts)`."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qvgen_jax.components import VAE, TextEncoder, Transformer
from qvgen_jax.diffusion.unipc import UniPCConfig, unipc_schedule
from qvgen_jax.errors import UserError
from qvgen_jax.request import check_request, latent_size, prompt_list, whole_number
from qvgen_jax.text.tokenizer import tokenize

WAN_DEFAULTS = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "steps": 50,
    "guidance_scale": 5.0,
    "fps": 16,
    "max_length": 512,
}
"""What is used where neither the call nor the folder's `generation_config.json` says otherwise."""


def load(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
) -> "Pipeline":
    """Loads a text-to-video pipeline.

    Args:
        path: a folder in diffusers' layout, full precision or exported by this project, or the
            name of one on the Hugging Face hub.
        dtype: float32 (default) or bfloat16: in which the transformer and the text encoder hold
            their matrices and compute. The VAE is always float32.
        mesh: devices to spread the videos of a batch over; every device holds all parameters.

    Raises:
        UserError: the folder is incomplete, damaged, of another model, or cannot be fetched.
    """
    from convert.load import read_components

    if mesh is not None:  # The models leave the placement of intermediate results to the compiler.
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    parts = read_components(path, _compute_dtype(dtype))
    for name in ("transformer", "vae", "text_encoder"):
        parts[name] = _placed(parts[name], mesh)
    return Pipeline(**parts, mesh=mesh)


def _compute_dtype(dtype: Any) -> jnp.dtype:
    try:
        named = jnp.dtype(jnp.float32 if dtype is None else dtype)
    except TypeError:
        named = None
    if named not in (jnp.float32, jnp.bfloat16):
        raise UserError(f"dtype is {dtype!r}, expected float32 or bfloat16")
    return named


def to_uint8(video: jax.Array) -> np.ndarray:
    """uint8 frames of float video in [-1, 1], rounded as diffusers' video processor does."""
    unit = np.clip(np.asarray(video, np.float32) * 0.5 + 0.5, 0.0, 1.0)
    return np.round(unit * 255.0).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A text-to-video model: text encoder, transformer, sampler and VAE.

    Arrays are channels last: video `[batch, frames, height, width, 3]` in [-1, 1], latents
    `[batch, frames, height, width, channels]`. *Normalised* latents are what the transformer sees.
    """

    transformer: Transformer
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Any
    scheduler: UniPCConfig
    defaults: Mapping[str, Any] = field(default_factory=lambda: dict(WAN_DEFAULTS))
    mesh: Mesh | None = None

    def encode_prompt(
        self, prompts: str | Sequence[str], max_length: int | None = None
    ) -> jax.Array:
        """Text embeddings `[prompts, max_length, text_dim]`, zero behind each prompt's last token.

        Prompts are cleaned, tokenized and cut to `max_length` as in PyTorch's Wan pipeline. Each is
        encoded alone, so that its embedding never depends on its neighbours.

        Raises:
            UserError: no prompts, or a `max_length` that is no positive number.
        """
        prompts = prompt_list(prompts)
        length = whole_number(self._setting("max_length", max_length), "max_length")
        distinct = list(dict.fromkeys(prompts))
        ids, mask = tokenize(self.tokenizer, distinct, length)
        rows = [self.text_encoder(ids[i : i + 1], mask[i : i + 1])[0] for i in range(len(ids))]
        encoded = dict(zip(distinct, rows, strict=True))
        return jnp.stack([encoded[prompt] for prompt in prompts])

    def to_latents(self, video: jax.Array) -> jax.Array:
        """Normalised latents (the posterior's mean) of float video in [-1, 1]."""
        return self.vae.normalize(self.vae.encode(video))

    def to_video(self, latents: jax.Array) -> jax.Array:
        """Float video in [-1, 1] of normalised latents."""
        return self.vae.decode(self.vae.denormalize(jnp.asarray(latents, jnp.float32)))

    def vae_posterior(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the normalised latents of a video."""
        return self.vae.normalize(*self.vae.posterior(video))

    def sample_latents(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seeds: int | Sequence[int] = 0,
        latents: jax.Array | None = None,
        *,
        flow_shift: float | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Final normalised latents, float32 `[prompts, f, h, w, channels]`; see `generate`."""
        size = self._latent_size(num_frames, height, width, latents)
        request = check_request(
            prompts,
            negative_prompts,
            seeds,
            (*size, self.transformer.config.in_channels),
            self._setting("steps", steps),
            self._setting("guidance_scale", guidance_scale),
            latents,
        )
        scheduler = self.scheduler
        if flow_shift is not None:
            scheduler = dataclasses.replace(scheduler, flow_shift=float(flow_shift))
        schedule = unipc_schedule(scheduler, request.steps)
        arrays = [request.noise(), self.encode_prompt(request.prompts, max_length)]
        if request.negative_prompts:
            arrays.append(self.encode_prompt(request.negative_prompts, max_length))

        def run(noise: jax.Array, text: jax.Array, negative: jax.Array | None = None) -> jax.Array:
            return self.transformer.sample(noise, text, negative, request.guidance_scale, schedule)

        return self._in_batches(run, arrays, batch_size)

    def to_frames(self, latents: jax.Array, batch_size: int | None = None) -> np.ndarray:
        """uint8 frames `[batch, f, h, w, 3]` of normalised latents, `batch_size` at a time."""

        def run(latents: jax.Array) -> np.ndarray:
            return to_uint8(self.to_video(latents))

        return self._in_batches(run, [jnp.asarray(latents)], batch_size)

    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompts: str | Sequence[str] | None = None,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        seeds: int | Sequence[int] = 0,
        latents: jax.Array | None = None,
        *,
        flow_shift: float | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
    ) -> np.ndarray:
        """Videos, uint8 `[prompts, frames, height, width, 3]`.

        Args:
            prompts: one string or several; one video each.
            negative_prompts: what to avoid, one for all or one per prompt; default the empty
                prompt. Without effect where `guidance_scale` is 1.
            num_frames: 1 plus a multiple of the VAE's 4. This and the next four default to the
                folder's `generation_config.json`, or to Wan's own settings.
            height: pixels, a multiple of 16.
            width: pixels, a multiple of 16.
            steps: calls of the transformer.
            guidance_scale: classifier-free guidance; up to 1 means none.
            seeds: one per prompt, or one from which *every* prompt's noise is drawn. A video
                depends on its own prompt, seed and settings, never on its neighbours or position.
            latents: the noise to start from instead, `[prompts, f, h, w, channels]`.
            flow_shift: of the noise levels, default the scheduler's; Wan wants 3 at 480p, 5 at
                720p.
            max_length: text tokens, default 512 or the folder's.
            batch_size: videos computed at once, default one per device. More is faster for small
                models, and agrees with other batch sizes to rounding only.

        Raises:
            UserError: an argument is out of range; the message says which and what would do.
        """
        final = self.sample_latents(
            prompts,
            negative_prompts,
            num_frames,
            height,
            width,
            steps,
            guidance_scale,
            seeds,
            latents,
            flow_shift=flow_shift,
            max_length=max_length,
            batch_size=batch_size,
        )
        return self.to_frames(final, batch_size)

    def with_transformer(
        self, graphdef: nnx.GraphDef, *states: dict, gate: jax.Array | None = None
    ) -> "Pipeline":
        """The same pipeline around another transformer of the same configuration.

        Args:
            graphdef: of a `WanTransformer`, from `nnx.split`.
            states: `params`, or `params, levels` of a quantized one.
            gate: float32 `[rank]` of its low-rank branch; None once it is gone.
        """
        transformer = Transformer(self.transformer.config, graphdef, states, gate)
        return dataclasses.replace(self, transformer=_placed(transformer, self.mesh))

    def _setting(self, name: str, value: Any) -> Any:
        return self.defaults[name] if value is None else value

    def _latent_size(self, frames: Any, height: Any, width: Any, latents: Any) -> tuple:
        time, space = self.vae.config.temporal_factor, self.vae.config.spatial_factor
        sizes = [self.defaults[name] for name in ("num_frames", "height", "width")]
        if latents is not None and np.ndim(latents) == 5:
            f, h, w = np.shape(latents)[1:4]
            sizes = [(f - 1) * time + 1, h * space, w * space]
        asked = [
            default if value is None else value
            for value, default in zip((frames, height, width), sizes, strict=True)
        ]
        return latent_size(*asked, time, space, self.transformer.config.patch_size)

    def _in_batches(
        self, run: Callable[..., jax.Array], arrays: Sequence[jax.Array], batch_size: int | None
    ) -> np.ndarray:
        """Runs over equal batches, the last one filled up: one compilation, one arithmetic."""
        devices = 1 if self.mesh is None else self.mesh.size
        size = devices if batch_size is None else whole_number(batch_size, "batch_size")
        if size % devices:
            raise UserError(f"batch_size is {size}, expected a multiple of the {devices} devices")
        count, outputs = len(arrays[0]), []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = [_spread(array[rows], self.mesh) for array in arrays]
            outputs.append(np.asarray(run(*batch))[: count - start])
        return np.concatenate(outputs)


def _spread(array: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Rows of the batch over all devices."""
    if mesh is None:
        return array
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))


def _placed(network: Any, mesh: Mesh | None) -> Any:
    """The network with its arrays on the default device, or whole on every device of the mesh."""
    where = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return dataclasses.replace(network, states=jax.device_put(network.states, where))
