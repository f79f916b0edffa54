"""The checkpoint that does best on held-out clips stays, and can be what ships."""

import jax
import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.training import loop
from qvgen_jax.training.best import is_better, keep_best, read_best
from qvgen_jax.training.check import check_config
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.validation import Validated
from tests.training.test_run import (
    CONFIG,
    MODEL,
    SCHEDULER,
    Clips,
    lines,
    shared_compilation,
    teacher,
)

__all__ = ["shared_compilation", "teacher"]  # Fixtures.


def config_of(**train) -> dict:
    return {**CONFIG, "train": {**CONFIG["train"], "keep_checkpoints": 1, **train}}


@pytest.mark.slow
def test_the_best_without_a_branch_is_kept_and_exported(teacher, tmp_path):
    """The branch lives up to the fourth of six steps; the fifth is better than the last."""
    losses = iter([0.1, 0.1, 0.1, 0.1, 0.5, 0.6])
    asked, config = [], config_of(validate_every=1)

    def validate(step, student):
        asked.append((student.gate, jax.tree.map(np.array, student.states[0])))
        scalars = {"held_out_loss": next(losses), "validation_seconds": 0.0}
        return Validated(scalars, {"layers": {}, "videos": []}, fps=8)

    arguments = (config, tmp_path, MODEL, SCHEDULER, teacher, Clips())
    last, _ = loop.run_steps(*arguments, validate=validate)
    assert [gate is None for gate, _ in asked] == [False] * 4 + [True] * 2
    assert [line["held_out_loss"] for line in lines(tmp_path)] == [0.1, 0.1, 0.1, 0.1, 0.5, 0.6]
    assert read_best(tmp_path) == {"step": 5, "held_out_loss": 0.5}
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [2, 4, 5, 6]

    arguments = (config_of(validate_every=1, export_best=True), *arguments[1:])
    best, _ = loop.run_steps(*arguments, validate=validate)
    assert int(best["step"]) == 5
    assert int(last["step"]) == 6
    # What was validated is what ships: the average of the weights.
    pairs = zip(jax.tree.leaves(best["ema"]), jax.tree.leaves(asked[4][1]), strict=True)
    for shipped, seen in pairs:
        np.testing.assert_array_equal(shipped, seen)


def test_where_nothing_was_validated_there_is_no_best(teacher, tmp_path):
    with (
        Checkpoints(tmp_path, keep=1) as checkpoints,
        pytest.raises(UserError, match="has no best checkpoint: no step without a branch"),
    ):
        loop.best_state(config_of(export_best=True), tmp_path, MODEL, teacher, checkpoints)


def test_a_loss_that_is_no_number_is_never_the_best(tmp_path):
    assert not is_better(tmp_path, float("nan"))
    assert is_better(tmp_path, 3.0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        keep_best(tmp_path, checkpoints, {"step": np.int32(4)}, 3.0)
        assert checkpoints.steps() == [4]
    assert not is_better(tmp_path, 3.0)
    assert is_better(tmp_path, 2.9)


@pytest.mark.parametrize("text", ["{", "[]", '{"step": "4", "held_out_loss": 1.0}'])
def test_a_damaged_record_of_the_best_is_told(tmp_path, text):
    (tmp_path / "best.json").write_text(text)
    with pytest.raises(UserError, match=r"best.json .* delete it: the next validation writes it"):
        is_better(tmp_path, 1.0)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"validate_every": 10}, r"validate_every=10 needs clips .*evaluate.held_out"),
        ({"validate_videos": 2}, r"validate_videos=2 .* by --config.train.validate_every too"),
        ({"export_best": True}, r"export_best=True needs .* set --config.train.validate_every"),
    ],
)
def test_validation_that_cannot_be_is_refused(train, message):
    from configs import read_config

    config = read_config("configs/tiny_w4a4.py").to_dict()
    with pytest.raises(UserError, match=message):
        check_config({**config, "train": {**config["train"], **train}})
