"""The stages of VAE training: from crops of one frame to whole clips.

A frame teaches colours and edges at a seventeenth of a clip's cost; motion comes after.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from qvgen_jax.errors import UserError


class Stage(NamedTuple):
    """Crops of `size` x `size` pixels and `frames` frames, `batch` at a time, for `steps` steps."""

    frames: int
    size: int
    batch: int
    steps: int

    @property
    def work(self) -> int:
        """Pixels seen."""
        return self.steps * self.batch * self.frames * self.size**2


def read_stages(rows: Any, clips: np.ndarray) -> list[Stage]:
    """The stages of a config, each a row of four numbers.

    Raises:
        UserError: a stage wants more frames or pixels than the clips have.
    """
    stages = [Stage(*row) for row in rows]
    _, frames, height, width, _ = clips.shape
    for stage in stages:
        if stage.frames > frames or stage.size > min(height, width):
            raise UserError(
                f"{stage} does not fit clips of {frames} frames of {height} x {width}; "
                "shorten the stage or make longer clips"
            )
    return stages


def stage_at(stages: list[Stage], step: int) -> tuple[Stage, bool]:
    """The stage that `step` belongs to, and whether it is that stage's last step."""
    for stage in stages:
        if step < stage.steps:
            return stage, step == stage.steps - 1
        step -= stage.steps
    raise ValueError(f"there are {step} fewer steps in the stages than asked for")


def crops(clips: np.ndarray, stage: Stage, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Random crops of uint8 `clips [n, t, h, w, 3]`.

    Returns:
        `video [batch, frames, size, size, 3]` and each clip's `background [batch, 3]`, uint8. The
        background is the first frame's corner pixel, which no shape reaches.
    """
    _, frames, height, width, _ = clips.shape
    video, background = [], []
    for index in rng.integers(len(clips), size=stage.batch):
        t = rng.integers(frames - stage.frames + 1)
        y, x = rng.integers(height - stage.size + 1), rng.integers(width - stage.size + 1)
        video.append(clips[index, t : t + stage.frames, y : y + stage.size, x : x + stage.size])
        background.append(clips[index, 0, 0, 0])
    return {"video": np.stack(video), "background": np.stack(background)}


def learning_rate(config: Mapping[str, Any], stages: list[Stage]) -> optax.Schedule:
    """Linear warm-up, then a cosine to a hundredth over the share of all pixels seen."""
    ends = np.cumsum([0, *(stage.steps for stage in stages)]).astype(np.float32)
    work = np.cumsum([0, *(stage.work for stage in stages)])
    share = (work / work[-1]).astype(np.float32)

    def schedule(step: jax.Array) -> jax.Array:
        progress = jnp.interp(jnp.asarray(step, jnp.float32), ends, share)
        decay = 0.01 + 0.99 * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        warm = jnp.minimum(1.0, (step + 1) / config["warmup_steps"])
        return config["learning_rate"] * decay * warm

    return schedule
