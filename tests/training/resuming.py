"""A run in one go and the same in two, and an export beside the student that it was made of."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.load import read_transformer
from qvgen_jax.training import loop
from qvgen_jax.transformer import Transformer
from tests.compiling import optimized
from tests.training.test_run import MODEL, SCHEDULER, Clips


def whole_and_resumed(
    values: Mapping,
    teacher: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    at: int,
    branch: bool,
) -> tuple[dict, dict]:
    """The final states of a run in one go, and of one that is interrupted before a step."""
    step = loop.compile_step(loop.make_recipe(values, MODEL, SCHEDULER, branch=branch))
    device = jax.devices()[0]  # As a restored state is: one compilation for all.
    monkeypatch.setattr(
        loop, "compile_step", lambda *_: lambda state, *x: step(jax.device_put(state, device), *x)
    )
    of_run = (MODEL, SCHEDULER, teacher, Clips())
    whole, _ = loop.run_steps(values, tmp_path / "whole", *of_run)
    enter = loop.enter_step

    def interrupt(state: dict, now: int, *rest) -> dict:
        if now == at:
            raise InterruptedError
        return enter(state, now, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "enter_step", interrupt)
        with pytest.raises(InterruptedError):
            loop.run_steps(values, tmp_path / "parts", *of_run)
    return whole, loop.run_steps(values, tmp_path / "parts", *of_run)[0]


def assert_predicts_the_same(export: Path, trained: Transformer) -> None:
    """An export's transformer, bit for bit what the student says."""
    loaded = read_transformer(export / "transformer", jnp.float32)
    rng = np.random.default_rng(0)
    batch = (
        rng.normal(size=(2, 2, 2, 4, 2)).astype(np.float32),
        np.array([900.0, 30.0], np.float32),
        rng.normal(size=(2, 3, 8)).astype(np.float32),
    )
    found, expected = (optimized(lambda *x, of=each: of(*x)) for each in (loaded, trained))
    np.testing.assert_array_equal(found(*batch), expected(*batch))
