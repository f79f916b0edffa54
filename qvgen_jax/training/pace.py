"""How fast a run goes: steps and tokens a second, and the share of the chips' peak."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import jax

from kernels.chips import chip_of
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.training.operations import step_work
from qvgen_jax.training.student import quant_config

T = TypeVar("T")
SPEED = ("steps_per_second", "tokens_per_second", "data_wait", "mfu", "validation_seconds")
"""What `Pace` and validations tell of time: all of a log line that two equal runs differ in."""


class Work(NamedTuple):
    """What one step is.

    Attributes:
        tokens: of all its samples' videos.
        operations: that teacher and student need, two for a multiply-add; what is recomputed is
            not counted, as model FLOPs utilization is defined (PaLM, arXiv 2204.02311, appendix B).
        peak: of all devices together, operations a second in bfloat16; 0 where it is not known.
    """

    tokens: int
    operations: float
    peak: float


def mean_work(
    config: Mapping, model: TransformerConfig, steps: Mapping[tuple[int, ...], int]
) -> Work:
    """Of a run whose batches have clips of several sizes, on average.

    Args:
        config, model: of the run.
        steps: how many steps of an epoch have clips with latents of each shape.
    """
    works = [(work_of(config, model, shape), count) for shape, count in steps.items()]
    total = sum(steps.values())
    tokens = sum(work.tokens * count for work, count in works) / total
    operations = sum(work.operations * count for work, count in works) / total
    return Work(round(tokens), operations, works[0][0].peak)


def work_of(config: Mapping, model: TransformerConfig, latents: Sequence[int]) -> Work:
    """Of a run whose clips have latents `[frames, height, width, channels]`."""
    patches = zip(latents[:3], model.patch_size, strict=True)
    tokens = math.prod(-(-size // patch) for size, patch in patches)
    train, quant = config["train"], quant_config(config["quant"], model)
    text, names = config["data"]["max_length"], quant.quantized(quantizable(model))
    asked = train["target"] == "teacher"
    each = step_work(model, tokens, text, quant.token_rank, "none", names, teacher=asked)
    devices = jax.devices()
    return Work(
        tokens * train["batch_size"],
        2.0 * sum(each.values()) * train["batch_size"],
        sum(chip_of(device).bf16 for device in devices) * 1e12,
    )


class Pace:
    """Speed since the last `restart`; the first answer includes compiling."""

    def __init__(self, step: int, work: Work):
        self._work = work
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time, self._waited = step, time.perf_counter(), 0.0

    def next_of(self, data: Iterator[T], running: jax.Array | None) -> T:
        """The next batch; the wait for it counts if `running`, of the step before, is done by then.

        While a step still runs, nothing is lost by waiting.
        """
        start = time.perf_counter()
        batch = next(data)
        if running is None or running.is_ready():
            self._waited += time.perf_counter() - start
        return batch

    def __call__(self, step: int) -> dict[str, float]:
        """`steps_per_second`, `tokens_per_second`, `data_wait`, the share of the time that went by
        with waiting for batches and no step at work at its end, and `mfu` where the chips' peak is
        known."""
        seconds = time.perf_counter() - self._time
        rate = (step - self._step) / seconds
        told = {
            "steps_per_second": round(rate, 3),
            "tokens_per_second": round(rate * self._work.tokens),
            "data_wait": round(self._waited / seconds, 3),
        }
        if self._work.peak:
            told["mfu"] = round(rate * self._work.operations / self._work.peak, 4)
        return told
