"""From a folder and a prompt to a video: `load(path)`, then `pipe.generate(prompts)`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from kernels.choose import BACKENDS
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.components import VAE, TextEncoder
from qvgen_jax.diffusion.guidance import Guidance, own_guidance
from qvgen_jax.diffusion.schedulers import Scheduler, make_schedule, shifted
from qvgen_jax.errors import UserError
from qvgen_jax.generation_config import WAN_DEFAULTS
from qvgen_jax.placement import (
    Shardings,
    automatic,
    for_models,
    placed,
    spread,
    spread_rows_of_pixels,
    together,
)
from qvgen_jax.request import check_request, latent_size, prompt_list, whole_number
from qvgen_jax.text.tokenizer import WAN_PROMPTS, PromptRule, tokenize
from qvgen_jax.transformer import Step, Transformer


def load(
    path: str | Path,
    dtype: Any = None,
    mesh: Mesh | None = None,
    *,
    shardings: Shardings = None,
    text_weights: str = "float",
    free_text_encoder: bool = False,
    keep_on_host: bool = False,
    kernels: str = "auto",
) -> "Pipeline":
    """Loads a text-to-video pipeline of Wan 2.1 or CogVideoX.

    Args:
        path: a folder in diffusers' layout, full precision or exported by this project, or the
            name of one on the Hugging Face hub.
        dtype: float32 (default) or bfloat16: in which the transformer and the text encoder hold
            their matrices and compute. The VAE is always float32.
        mesh: devices to spread the videos of a batch over; every device holds all parameters, but
            for what `shardings` cuts. A mesh of `qvgen_jax.mesh.make_mesh` cuts the parameters
            by its own rules and computes each video on all devices of its `fsdp`, `context` and
            `tensor` axes together: tokens and attention's heads apart, weights gathered layer by
            layer as codes, the VAE's rows of pixels apart. With `data` 2 the two branches of
            guidance run side by side.
        shardings: where the transformer's parameters shall live: one `jax.sharding.Sharding` for
            all; or a nested dict of them like `qvgen_jax.models.abstract_params(config)`, where one
            may stand for a whole subtree; or a function from such a dict of shapes to either, which
            also fits a packed transformer. Of an imported folder every host then reads its own
            slices only. Without `mesh`, one video is computed on all their devices.
        text_weights: of the text encoder: "float", as `dtype` says, or "int8", a byte each.
        free_text_encoder: keep the text encoder (5.7 B parameters in a real Wan, 4.8 B in
            CogVideoX) in the host's memory, and on the devices only while prompts are encoded.
        keep_on_host: leave a full-precision transformer in the host's memory, for who runs it
            block by block (`qvgen_jax.ptq`); it computes as ever, on copies.
        kernels: what multiplies the codes of an exported transformer: "auto", or a backend of
            `kernels.choose`; where that does not take a product, XLA does.

    Raises:
        UserError: the folder is incomplete, damaged, of another model, or cannot be fetched; the
            kernels are unknown; or the shardings are of other parameters, of other devices than the
            mesh, or do not divide.
    """
    from convert.load import read_components

    if kernels not in ("auto", *BACKENDS):
        known = ", ".join(("auto", *BACKENDS))
        raise UserError(f"kernels is {kernels!r}, expected one of {known}")
    mesh = None if mesh is None else automatic(mesh)
    where = for_models(shardings, mesh)
    parts = read_components(path, _compute_dtype(dtype), text_weights, where, kernels)
    resident = ("vae",) + (() if keep_on_host else ("transformer",))
    resident += () if free_text_encoder else ("text_encoder",)
    for name in resident:
        parts[name] = placed(parts[name], mesh)
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
    scheduler: Scheduler
    defaults: Mapping[str, Any] = field(default_factory=lambda: dict(WAN_DEFAULTS))
    mesh: Mesh | None = None
    prompt_rule: PromptRule = WAN_PROMPTS
    # Embeddings that are known already, `[max_length, text_dim]` by prompt and length.
    encoded: Mapping[tuple[str, int], jax.Array] = field(default_factory=dict)

    def encode_prompt(
        self, prompts: str | Sequence[str], max_length: int | None = None
    ) -> jax.Array:
        """Text embeddings `[prompts, max_length, text_dim]`.

        Prompts are prepared and cut to `max_length` as in the PyTorch pipeline of the family; Wan's
        are zero behind the last token, CogVideoX attends its padding. Each prompt is encoded alone,
        so that its embedding never depends on its neighbours.

        Raises:
            UserError: no prompts, or a `max_length` that is no positive number.
        """
        prompts = prompt_list(prompts)
        length = whole_number(self._setting("max_length", max_length), "max_length")
        known = self._encoded(prompts, length)
        return jnp.stack([known[prompt, length] for prompt in prompts])

    def with_encoded(
        self, prompts: str | Sequence[str], max_length: int | None = None
    ) -> "Pipeline":
        """The same pipeline that knows these prompts' embeddings, and encodes only others.

        Raises:
            UserError: as `encode_prompt`.
        """
        length = whole_number(self._setting("max_length", max_length), "max_length")
        return dataclasses.replace(self, encoded=self._encoded(prompt_list(prompts), length))

    def _encoded(self, prompts: Sequence[str], length: int) -> dict[tuple[str, int], jax.Array]:
        """All known embeddings, those of `prompts` among them."""
        known = dict(self.encoded)
        new = [prompt for prompt in dict.fromkeys(prompts) if (prompt, length) not in known]
        if new:
            ids, mask = tokenize(self.tokenizer, new, length, self.prompt_rule)
            # From the host's memory, if it lives there, once for all prompts, and gone afterwards.
            encoder = placed(self.text_encoder, self.mesh)
            for row, prompt in enumerate(new):
                known[prompt, length] = encoder(ids[row : row + 1], mask[row : row + 1])[0]
        return known

    def to_latents(self, video: jax.Array) -> jax.Array:
        """Normalised latents (the posterior's mean) of float video in [-1, 1]."""
        return self.vae.normalize(self.vae.encode(video))

    def to_video(self, latents: jax.Array, tiling: Tiling | bool = False) -> jax.Array:
        """Float video in [-1, 1] of normalised latents; in `tiling`'s tiles, if given."""
        return self.vae.decode(self.vae.denormalize(jnp.asarray(latents, jnp.float32)), tiling)

    def vae_posterior(self, video: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance of the normalised latents of a video."""
        return self.vae.normalize(*self.vae.posterior(video))

    def sample_latents(
        self,
        prompts: str | Sequence[str],
        *settings: Any,
        batch_size: int | None = None,
        **named: Any,
    ) -> np.ndarray:
        """Final normalised latents, float32 `[prompts, f, h, w, channels]`.

        Args and errors as of `generate`, without its `tiling`.
        """
        arrays, how, extra = self.start(prompts, *settings, **named)

        def run(negative_embeds: jax.Array | None = None, **arrays: jax.Array) -> jax.Array:
            return self.transformer.sample(negative_embeds=negative_embeds, **arrays, **how)

        return self._in_batches(run, arrays, batch_size)[:, extra:]

    def latent_steps(
        self, prompt: str, negative_prompt: str | None = None, **settings: Any
    ) -> Iterator[Step]:
        """`sample_latents` of one prompt, step by step; see `Transformer.steps`.

        Args:
            prompt: for one video.
            negative_prompt: what it should not be.
            settings: as of `generate`; but no `batch_size`.

        Raises:
            UserError: as `generate`; now, not at the first step.
        """
        arrays, how, extra = self.start(prompt, negative_prompt, **settings)
        # On a mesh for several videos, all are this one.
        rows = np.zeros(together(self.mesh), int)
        batch = {name: spread(array[rows], self.mesh) for name, array in arrays.items()}
        steps = self.transformer.steps(**{"negative_embeds": None} | batch, **how)
        return (Step(*(array[:1, extra:] for array in step)) for step in steps)

    def start(
        self,
        prompts: Any,
        negative_prompts: Any = None,
        num_frames: Any = None,
        height: Any = None,
        width: Any = None,
        steps: Any = None,
        guidance_scale: Any = None,
        seeds: Any = 0,
        latents: Any = None,
        *,
        guidance: Guidance | None = None,
        flow_shift: Any = None,
        max_length: Any = None,
    ) -> tuple[dict[str, jax.Array], dict[str, Any], int]:
        """A checked request, as `sample` and `steps` of a transformer take it.

        Args and errors as of `generate`, without its `tiling` and `batch_size`.

        Returns:
            Arrays with a row per video, the other arguments, and how many frames go in front.
        """
        size, extra = self._latent_size(num_frames, height, width, latents)
        if guidance is None:
            count = None if steps is None else whole_number(steps, "steps")
            guidance = own_guidance(self.defaults, guidance_scale, count)
        request = check_request(
            prompts,
            negative_prompts,
            seeds,
            (extra + size[0], *size[1:], self.transformer.config.in_channels),
            self._setting("steps", steps),
            guidance.scale,
            latents,
        )
        guidance = dataclasses.replace(guidance, scale=request.guidance_scale)
        schedule = make_schedule(shifted(self.scheduler, flow_shift), request.steps)
        self.transformer.check_schedule(schedule)  # Before the prompts are encoded.
        arrays = {
            "noise": request.noise(),
            "text_embeds": self.encode_prompt(request.prompts, max_length),
            "step_noise": request.step_noise(),
        }
        if request.negative_prompts:
            arrays["negative_embeds"] = self.encode_prompt(request.negative_prompts, max_length)
        return arrays, {"guidance": guidance, "schedule": schedule}, extra

    def to_frames(
        self,
        latents: jax.Array,
        batch_size: int | None = None,
        tiling: Tiling | bool = False,
    ) -> np.ndarray:
        """uint8 frames `[batch, f, h, w, 3]` of normalised latents, `batch_size` at a time."""

        def run(latents: jax.Array) -> np.ndarray:
            latents = spread_rows_of_pixels(latents, self.mesh)
            return to_uint8(self.to_video(latents, tiling))

        return self._in_batches(run, {"latents": jnp.asarray(latents)}, batch_size)

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
        guidance: Guidance | None = None,
        flow_shift: float | None = None,
        max_length: int | None = None,
        batch_size: int | None = None,
        tiling: Tiling | bool = False,
    ) -> np.ndarray:
        """Videos, uint8 `[prompts, frames, height, width, 3]`.

        Args:
            prompts: one string or several; one video each.
            negative_prompts: what to avoid, one for all or one per prompt; default the empty
                prompt. Without effect where `guidance_scale` is 1.
            num_frames: 1 plus a multiple of 4 in Wan, of 8 in CogVideoX. This and the next four
                default to the folder's `generation_config.json`, or to the family's own settings.
            height: pixels, a multiple of 16.
            width: pixels, a multiple of 16.
            steps: calls of the transformer.
            guidance_scale: classifier-free guidance; up to 1 means none. A folder's
                `unguided_steps` turns it off in so many of its last default steps.
            seeds: one per prompt, or one from which *every* prompt's noise is drawn. A video
                depends on its own prompt, seed and settings, never on its neighbours or position.
            latents: the noise to start from instead, `[prompts, f, h, w, channels]`; for
                CogVideoX1.5 with the frames that fill its temporal patches in front.
            guidance: more than a scale: CogVideoX's dynamic one, none in the last steps, two
                passes; `guidance_scale` is then without effect.
            flow_shift: of Wan's noise levels, default the scheduler's; it wants 3 at 480p, 5 at
                720p.
            max_length: text tokens, default the folder's, or 512 in Wan and 226 in CogVideoX.
            tiling: decode tile by tile, in less memory; True for diffusers' tiles.
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
            guidance=guidance,
            flow_shift=flow_shift,
            max_length=max_length,
            batch_size=batch_size,
        )
        return self.to_frames(final, batch_size, tiling)

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
        return dataclasses.replace(self, transformer=placed(transformer, self.mesh))

    def _setting(self, name: str, value: Any) -> Any:
        return self.defaults[name] if value is None else value

    def _latent_size(self, frames: Any, height: Any, width: Any, latents: Any) -> tuple:
        """Latent frames, height and width, and how many frames go in front while sampling."""
        time, space = self.vae.config.temporal_factor, self.vae.config.spatial_factor
        sizes = [self.defaults[name] for name in ("num_frames", "height", "width")]
        if latents is not None and np.ndim(latents) == 5:
            f, h, w = np.shape(latents)[1:4]
            sizes = [(f - 1) * time + 1, h * space, w * space]
        asked = [
            default if value is None else value
            for value, default in zip((frames, height, width), sizes, strict=True)
        ]
        patch = self.transformer.config.patch_size
        size = latent_size(*asked, time, self.vae.frame_unit, space, patch)
        return size, -size[0] % patch[0]

    def _in_batches(
        self,
        run: Callable[..., jax.Array],
        arrays: Mapping[str, jax.Array],
        batch_size: int | None,
    ) -> np.ndarray:
        """Runs over equal batches, the last one filled up: one compilation, one arithmetic."""
        devices = together(self.mesh)
        size = devices if batch_size is None else whole_number(batch_size, "batch_size")
        if size % devices:
            raise UserError(f"batch_size is {size}, expected a multiple of the {devices} devices")
        count, outputs = len(next(iter(arrays.values()))), []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            batch = {name: spread(array[rows], self.mesh) for name, array in arrays.items()}
            outputs.append(np.asarray(run(**batch))[: count - start])
        return np.concatenate(outputs)
