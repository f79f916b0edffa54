"""What latents look like, without the VAE: a linear map from their channels to colours.

A VAE's latents hold, beside all else, the colours of their patch, nearly linearly. A map costs
nothing per step and shows every frame at any size; decoding even one frame with a real model's VAE
costs about as much as a step on small hardware. The map is fitted to the VAE at hand, so that no
table of factors per model is needed.
"""

import jax.numpy as jnp
import numpy as np

from qvgen_jax.data.moving_shapes import example
from qvgen_jax.pipeline import Pipeline

_CLIPS = 12
_SHOWN = 4


def fit_colours(pipe: Pipeline) -> np.ndarray:
    """The affine map from normalised latents to RGB, float32 `[channels + 1, 3]`, by least squares.

    The VAE encodes clips of `data.moving_shapes`: six colours on three backgrounds span RGB, and
    the embedded tiny VAE knows nothing else.
    """
    frames = 1 + pipe.vae.frame_unit
    clips = [example(index, seed=0)[0][:frames] for index in range(_CLIPS)]
    video = np.stack(clips).astype(np.float32) / 127.5 - 1
    # One by one: the least memory.
    latents = np.concatenate(
        [np.asarray(pipe.to_latents(jnp.asarray(clip[None]))) for clip in video]
    )
    inputs = _with_one(latents).reshape(-1, latents.shape[-1] + 1)
    targets = patch_colours(video, latents.shape[1:4]).reshape(-1, 3)
    return np.linalg.lstsq(inputs, targets, rcond=None)[0].astype(np.float32)


def patch_colours(video: np.ndarray, size: tuple[int, int, int]) -> np.ndarray:
    """Mean colours of what each latent pixel stands for: `[batch, f, h, w, 3]` of a video.

    Args:
        video: `[batch, 1 + n, H, W, 3]`; the first latent frame is the first frame alone.
        size: f, h, w.
    """
    batch, f, h, w = len(video), *size
    pixels = video.reshape(*video.shape[:2], h, video.shape[2] // h, w, -1, 3).mean((3, 5))
    first, rest = pixels[:, :1], pixels[:, 1:]
    if f == 1:
        return first
    rest = rest.reshape(batch, f - 1, -1, h, w, 3).mean(2)
    return np.concatenate([first, rest], 1)


def preview(latents: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Up to four frames of one video, first to last, side by side: uint8 `[h, n * w, 3]`.

    Args:
        latents: normalised, `[1, f, h, w, channels]`.
        colours: of `fit_colours`.
    """
    latents = np.asarray(latents, np.float32)[0]
    chosen = np.unique(np.linspace(0, len(latents) - 1, _SHOWN).round().astype(int))
    frames = np.clip(_with_one(latents[chosen]) @ colours * 0.5 + 0.5, 0, 1)
    return np.concatenate(np.round(frames * 255).astype(np.uint8), axis=1)


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones((*latents.shape[:-1], 1), latents.dtype)], -1)
