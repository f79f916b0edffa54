"""What quantizing something does to a model's predictions, measured on noisy clips.

The damage is the squared error of the prediction by its squared norm, mean over clips, for each
timestep. Squared, since errors of different layers are nearly uncorrelated: squares then add up, as
plans assume. One program asks everything: which layer is quantized, and how, are its arguments.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from kernels.reference import at_least_float32
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.evaluation.drift import noisy_latents
from qvgen_jax.models import TransformerConfig, build_transformer, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.switched import switched, switched_off
from qvgen_jax.training.step import fill_patches


class Samples:
    """Noisy clips at every timestep, in calls of one size.

    Attributes:
        timesteps: 0 (clean) to 1000 (noise).
        clips: how many.
        calls: latents `[size, f, h, w, c]`, timesteps `[size]` and text_embeds of each call.
    """

    def __init__(
        self,
        clips: Mapping[str, np.ndarray],
        timesteps: Sequence[int],
        scheduler: Scheduler,
        patch: int,
        size: int,
    ):
        """Of `latents [clips, f, h, w, c]` and `text_embeds`; the noise is that of `drift`."""
        latents = clips["latents"]
        filled = fill_patches({"latent_mean": latents, "latent_logvar": latents}, patch)
        latents, self.timesteps = filled["latent_mean"], tuple(timesteps)
        self.clips, index = len(latents), jnp.arange(len(latents), dtype=jnp.int32)
        noisy, times = zip(
            *(noisy_latents(jnp.asarray(latents), index, t, scheduler) for t in timesteps),
            strict=True,
        )
        texts = np.concatenate([clips["text_embeds"]] * len(timesteps))
        rows = (np.concatenate(noisy), np.concatenate(times), texts)
        count = len(texts)
        self.calls = []
        for start in range(0, count, min(size, count)):
            # The last call is as large as the others: what it has twice is not counted.
            here = np.minimum(np.arange(start, start + min(size, count)), count - 1)
            self.calls.append(tuple(x[here] for x in rows))

    def per_timestep(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """Means over clips of what the calls gave for each of their rows: `[timesteps]`."""
        rows = np.concatenate(values)[: len(self.timesteps) * self.clips]
        return rows.reshape(len(self.timesteps), self.clips).mean(1)


class Probe:
    """A network with switches, and what it says with all of them off.

    Args:
        model: its sizes.
        quant: its rotation, smoothing, ranges and layers in full precision.
        dtype: in which it computes.
        samples: that it is asked.
    """

    def __init__(
        self, model: TransformerConfig, quant: QuantConfig, dtype: jnp.dtype, samples: Samples
    ):
        self.names, self.samples = quant.quantized(quantizable(model)), samples
        network = nnx.eval_shape(
            lambda: build_transformer(
                model,
                key=jax.random.key(0),
                dense=switched(quant),
                dtype=dtype,
                clip_mode=quant.clip_index,
                buckets=quant.buckets,
                remat="none",
            )
        )
        self._graphdef = nnx.split(network, nnx.Param, Levels)[0]
        self._reference: list[np.ndarray] | None = None

    def damage(self, params: dict, levels: dict) -> np.ndarray:
        """Of a network in this state: float64 `[timesteps]`.

        Args:
            params: of `switched_params`, at any bits.
            levels: 0 where a quantizer is off.
        """
        reference = self.reference(params, levels)
        return self.samples.per_timestep(
            [np.asarray(d, np.float64) for _, d in self._answers(params, levels, reference)]
        )

    def reference(self, params: dict, levels: dict) -> list[np.ndarray]:
        """What it says with all switches off, of each call; asked once, whatever the bits."""
        if self._reference is None:
            off = switched_off(levels, self.names)
            nothing = [np.zeros_like(latents) for latents, _, _ in self.samples.calls]
            self._reference = [np.asarray(y) for y, _ in self._answers(params, off, nothing)]
        return self._reference

    def _answers(self, params: dict, levels: dict, references: Sequence[np.ndarray]):
        for call, reference in zip(self.samples.calls, references, strict=True):
            yield _answer(self._graphdef, params, levels, *call, reference)


@partial(jax.jit, static_argnums=0)
def _answer(graphdef, params, levels, latents, timesteps, text_embeds, reference):
    """The prediction, and its squared distance from the reference by that one's squared norm."""
    y = nnx.merge(graphdef, params, levels)(latents, timesteps, text_embeds)
    y, axes = at_least_float32(y), tuple(range(1, latents.ndim))
    return y, jnp.sum(jnp.square(y - reference), axes) / jnp.sum(jnp.square(reference), axes)
