"""Validations of the real tiny pipeline while it trains: the same again, and without a trace."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from configs.tiny_w4a4 import get_config
from convert.packed import layer_names, to_packed
from convert.tables import table_for
from qvgen_jax import hosts, load
from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import drift, validate
from qvgen_jax.models import quantizable
from qvgen_jax.training import loop, run
from qvgen_jax.training.student import quant_config
from qvgen_jax.training.validation import worst_layer
from tests.training.test_run import lines, shared_compilation
from tests.training.test_time_table_run import Clips

__all__ = ["shared_compilation"]  # A fixture.

# Rank 1 in two steps, then none in two; the only checkpoint before the last is where it ends.
TRAIN = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 4, "log_every": 1}


def config(**train) -> dict:
    config = get_config().to_dict()
    config["quant"] |= {"rank": 1}
    config["train"] |= {**TRAIN, "validate_every": 1, "validate_videos": 2, **train}
    config["evaluate"] |= {"held_out": "clips"}
    config["sample"] |= {"batch_size": 2}
    return config


@pytest.fixture(scope="module")
def pipe():
    """Videos of 5 frames of 32 x 32 in three steps."""
    pipe = load(config()["model"])
    small = {"steps": 3, "num_frames": 5, "height": 32, "width": 32}
    return dataclasses.replace(pipe, defaults={**pipe.defaults, **small})


@pytest.fixture
def train(pipe, monkeypatch):
    """A run in a workdir, up to a step if one is given."""
    model = pipe.transformer.config
    clips = Clips(model.in_channels, model.text_dim)
    monkeypatch.setattr(drift, "ensure_held_out", lambda *_: None)
    monkeypatch.setattr(drift, "EncodedDataset", lambda *_: clips)

    def train(workdir, values, until=None):
        found = None
        if values["train"]["validate_every"]:
            found = validate.validation(values, workdir, pipe, layer_names)
        enter = loop.enter_step

        def entered(state, step, *rest):
            if step == until:
                raise InterruptedError
            return enter(state, step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(loop, "enter_step", entered)
            teacher = pipe.transformer.states[0]
            arguments = (values, workdir, model, pipe.scheduler, teacher, clips)
            return loop.run_steps(*arguments, validate=found)[0]

    return train


def files(workdir) -> dict[str, bytes]:
    """The rows and every video."""
    folder = workdir / "validation"
    paths = [workdir / "validation.jsonl", *sorted(folder.rglob("*.mp4"))]
    return {str(path.relative_to(workdir)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_validations_come_again_in_a_resumed_run_and_leave_no_trace_in_it(
    pipe, train, tmp_path, monkeypatch
):
    whole, stopped, plain = (tmp_path / name for name in ("whole", "stopped", "plain"))
    for folder in (whole, stopped, plain):
        folder.mkdir()
    state = train(whole, config())
    _rows_are_whole(whole, pipe, state)

    with pytest.raises(InterruptedError):
        train(stopped, config(), until=3)  # Three rows, of which the third is after step 2.
    before = {path: path.stat().st_mtime_ns for path in stopped.glob("validation/teacher/*")}
    with monkeypatch.context() as patch:
        patch.setattr(drift, "save_arrays", None)  # The teacher is not asked again.
        resumed = train(stopped, config())
    assert files(stopped) == files(whole)
    assert lines(stopped) == lines(whole)
    assert {path: path.stat().st_mtime_ns for path in before} == before

    without = train(plain, config(validate_every=0, validate_videos=0))
    for other in (resumed, without):
        jax.tree.map(np.testing.assert_array_equal, other, state)
    pairs = zip(lines(whole), lines(plain), strict=True)
    known = [{name: row[name] for name in unseen} for row, unseen in pairs]
    assert known == lines(plain)


def _rows_are_whole(workdir, pipe, state) -> None:
    rows = [json.loads(line) for line in (workdir / "validation.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    model = pipe.transformer.config
    quant = quant_config(config()["quant"], model)
    names, params = quantizable(model), state["params"]
    tensors = to_packed(table_for(model), params, names, quant, levels=state["levels"])
    exported = {name.removesuffix(".codes") for name in tensors if name.endswith(".codes")}
    logged = lines(workdir)
    for row, line in zip(rows, logged, strict=True):
        assert row["layers"].keys() == exported
        # Of the row six digits are kept.
        assert np.mean(row["normalised"]) == pytest.approx(line["held_out_loss"], rel=1e-5)
        assert len(row["timesteps"]) == len(row["cosine"]) == len(row["relative"])
        assert row["drift"]["relative"] == pytest.approx(line["drift"], rel=1e-5)
        norms = [layer["branch_norm"] for layer in row["layers"].values()]
        assert all(norm is None for norm in norms) if row["step"] > 1 else min(norms) > 0
        assert ("branch_norm" in line) == (row["step"] <= 1)
        for shown in row["videos"]:
            for side in ("teacher", "student"):
                assert read_video(workdir / shown[side]).shape == (5, 32, 32, 3)
    assert math.isfinite(logged[-1]["weight_error_worst"])


def test_what_is_no_number_is_null_in_a_row_and_the_worst_layer():
    found = {"drift": {"motion": math.nan}, "layers": {"a": {"weight_error": 0.5}}}
    found["layers"]["b"] = {"weight_error": math.inf}
    row = validate._plain(found)
    assert row["drift"] == {"motion": None}
    assert row["layers"] == {"a": {"weight_error": 0.5}, "b": {"weight_error": None}}
    assert worst_layer(row) == "b"


def test_several_processes_are_told_that_they_do_not_validate(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "is_alone", lambda: False)
    with pytest.raises(UserError, match=r"validate_every=1 is for runs of one process"):
        run.train(config(validate_videos=0), tmp_path)
