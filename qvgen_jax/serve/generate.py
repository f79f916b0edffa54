"""One request to its videos, telling after every step how far it is; knows no page."""

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import NamedTuple

import jax
import numpy as np

from qvgen_jax.diffusion.guidance import own_guidance
from qvgen_jax.errors import UserError
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.serve.limits import BOTH, FULL, LOW, Asked, check, limits_of
from qvgen_jax.serve.preview import fit_colours, preview


class Timing(NamedTuple):
    """What one side took.

    Attributes:
        step: seconds of the median step. The first of a size also compiles, and is left out where
            there are others.
        steps: seconds of all steps, with what was compiled.
        decode: seconds of the VAE, likewise.
    """

    step: float
    steps: float
    decode: float


class Progress(NamedTuple):
    """After a step, or at the end of a side.

    Attributes:
        side: `FULL` or `LOW`.
        step: steps done, of `steps`; 0 before the first.
        steps: calls of the transformer.
        picture: uint8 `[h, n * w, 3]`, see `preview`; None before the first step.
        frames: uint8 `[frames, height, width, 3]` at the end, else None.
        timing: at the end, else None.
    """

    side: str
    step: int
    steps: int
    picture: np.ndarray | None = None
    frames: np.ndarray | None = None
    timing: Timing | None = None


@dataclass
class Studio:
    """The loaded pipelines, and one request at a time on them.

    Attributes:
        teacher: full precision.
        student: the run's export; None where there is none.
        why_alone: why there is none, for the page.
    """

    teacher: Pipeline
    student: Pipeline | None = None
    why_alone: str = ""
    _busy: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.limits = limits_of(self.teacher.defaults, self.teacher.vae.config.temporal_factor)
        self._colours = fit_colours(self.teacher)

    def generate(self, asked: Asked) -> Iterator[Progress]:
        """The steps of one side, its video, and so for the other; it may be left at any point.

        Both sides start from the same noise and are guided in the same way, the teacher's: what
        differs is the transformer.

        Raises:
            UserError: the request is refused, before anything is computed; or the device's memory
                is too small for it.
        """
        asked = check(asked, self.limits, self.teacher.defaults, self.student is not None)
        names = (FULL, LOW) if asked.sides == BOTH else (asked.sides,)
        pipes = {name: self.teacher if name == FULL else self.student for name in names}
        guidance = own_guidance(self.teacher.defaults, asked.guidance_scale, asked.steps)
        settings = asked.settings() | {"guidance": guidance}
        with self._computing():
            started = {
                name: pipe.latent_steps(asked.prompt, asked.negative_prompt, **settings)
                for name, pipe in pipes.items()
            }
        for name, pipe in pipes.items():
            yield from self._side(name, pipe, started.pop(name), asked.steps)

    def _side(self, name: str, pipe: Pipeline, steps: Iterator, count: int) -> Iterator[Progress]:
        yield Progress(name, 0, count)
        seconds: list[float] = []
        for number in range(1, count + 1):
            with self._computing():
                start = time.perf_counter()
                step = jax.block_until_ready(next(steps))
                seconds.append(time.perf_counter() - start)
            # What the model sees behind the noise, not the noisy latents themselves.
            picture = preview(step.clean, self._colours)
            if number < count:
                yield Progress(name, number, count, picture)
        with self._computing():
            start = time.perf_counter()
            frames = pipe.to_frames(step.latents)[0]
            decode = time.perf_counter() - start
        timing = Timing(statistics.median(seconds[1:] or seconds), sum(seconds), decode)
        yield Progress(name, count, count, picture, frames, timing)

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        # A request that was cancelled may still be in its last step when the next one starts.
        with self._busy:
            try:
                yield
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                raise UserError(
                    "the device's memory is too small for this; ask for fewer frames or a smaller "
                    "size"
                ) from error


def ratio(timings: Mapping[str, Timing]) -> float | None:
    """How many times as fast a low-bit step is as one in full precision; None without both."""
    if set(timings) != {FULL, LOW}:
        return None
    return timings[FULL].step / timings[LOW].step
