"""A run whose batches have clips of two sizes: it resumes exactly, and each size is trained on."""

import json
from types import MappingProxyType

import jax
import numpy as np
import pytest

from qvgen_jax.data.dataset import Turns
from qvgen_jax.training import loop
from tests.training.test_run import CONFIG, MODEL, SCHEDULER, Clips, shared_compilation, teacher

__all__ = ["shared_compilation", "teacher"]  # Fixtures.

STEPS = 5
WHOLE = {
    **CONFIG,
    "quant": {**CONFIG["quant"], "rank": 0},
    "train": {**CONFIG["train"], "steps": STEPS, "log_every": 1, "checkpoint_every": 2},
}


class TwoSizes(Clips):
    """Three clips of two latent frames, then four of one."""

    buckets = MappingProxyType({"long": range(3), "short": range(3, 7)})

    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict:
        clip = super().__getitem__(index)
        frames = 2 if index < 3 else 1
        return {k: v[:frames] if k.startswith("latent") else v for k, v in clip.items()}


@pytest.mark.slow
def test_a_run_over_two_sizes_resumes_exactly(teacher, tmp_path, monkeypatch):
    turns = Turns([3, 4], CONFIG["train"]["batch_size"], CONFIG["seed"])
    assert {turns(step)[0] for step in range(STEPS)} == {0, 1}
    run = (MODEL, SCHEDULER, teacher, TwoSizes())
    whole, _ = loop.run_steps(WHOLE, tmp_path / "whole", *run)
    shapes, enter = [], loop.enter_step

    def stopped(state, step, *others):
        shapes.append(step)
        if step == 3 and len(shapes) == 4:
            raise InterruptedError
        return enter(state, step, *others)

    monkeypatch.setattr(loop, "enter_step", stopped)
    with pytest.raises(InterruptedError):
        loop.run_steps(WHOLE, tmp_path / "parts", *run)
    resumed, _ = loop.run_steps(WHOLE, tmp_path / "parts", *run)
    assert shapes[:5] == [0, 1, 2, 3, 2]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    logs = [
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("whole", "parts")
    ]
    assert [row["loss"] for row in logs[0]] == [row["loss"] for row in logs[1]]
    assert len(logs[0]) == STEPS
