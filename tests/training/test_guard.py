"""Numbers that go bad: updates skipped, the way back, and what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.training import loop
from qvgen_jax.training.guard import Alarms, NotFinite, check, diagnosis
from qvgen_jax.training.optimizer import keep_scales_positive
from qvgen_jax.training.step import motion, unless_bad
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


def test_a_bad_step_leaves_every_number_and_counts_on():
    old = {"w": jnp.array([1.0, 2]), "count": jnp.int32(4)}
    new = {"w": jnp.array([jnp.nan, 3]), "count": jnp.int32(5)}
    kept = unless_bad(jnp.array(False), new, old)
    np.testing.assert_array_equal(kept["w"], old["w"])
    assert kept["count"] == 5
    np.testing.assert_array_equal(unless_bad(jnp.array(True), new, old)["w"], new["w"])


def test_no_update_takes_a_quantizer_s_scale_to_zero():
    layer = {"lower": jnp.ones(2), "scale": jnp.array([1e-3, 1e-3]), "zero_point": jnp.ones(2)}
    before = {"to_q": layer, "norm": {"scale": jnp.array([1e-3])}}
    moved = jax.tree.map(lambda x: x - jnp.array([2e-3]), before)
    kept = keep_scales_positive(moved, before)
    np.testing.assert_allclose(kept["to_q"]["scale"], 5e-4)
    np.testing.assert_array_equal(kept["norm"]["scale"], moved["norm"]["scale"])
    np.testing.assert_array_equal(kept["to_q"]["lower"], moved["to_q"]["lower"])
    up = jax.tree.map(lambda x: x + 1, before)
    np.testing.assert_allclose(keep_scales_positive(up, before)["to_q"]["scale"], 1.001)


def state(in_a_row: int, **params) -> dict:
    counters = {"step": jnp.int32(9), "order": jnp.int32(0)}
    return {**counters, "skipped": {"in_a_row": jnp.int32(in_a_row)}, "params": params}


def test_the_reason_is_told_by_name():
    good = {"a": {"scale": jnp.ones(3)}, "b": {"lower": jnp.ones(())}}
    metrics = {"loss": jnp.float32(1), "finite": jnp.array([True, False])}
    check(state(3, **good), metrics, 3)
    with pytest.raises(NotFinite, match=r"step 9: .* gradients of b.lower are not"):
        check(state(4, **good), metrics, 3)
    neither = np.array([False, False])
    assert "the loss is not: clips" in diagnosis(good, float("nan"), neither)
    bad = {"a": {"scale": jnp.array([1, -2e-3])}, "b": {"lower": jnp.array(jnp.nan)}}
    told = "a.scale has a scale of -0.002, b.lower is not finite"
    assert diagnosis(bad, float("nan"), neither) == told


def test_a_loss_far_above_those_before_is_told_once_there_are_some():
    alarms = Alarms()
    assert not any(alarms.told(1.0 + step / 100, 1.0) for step in range(20))
    assert alarms.told(1.5, 1.0) == []
    assert alarms.told(9.0, 1.0) == ["the loss is 9, the median of 20 lines before 1.1"]
    assert alarms.told(float("nan"), 1.0) != []


def test_a_student_that_stands_still_is_told_once():
    alarms = Alarms()
    assert [len(alarms.told(1.0, motion)) for motion in (0.4, 0.4, 0.9)] == [0, 0, 0]
    (told,) = [text for motion in (0.4, 0.3, 0.2, 0.1) for text in alarms.told(1.0, motion)]
    assert "changes over frames 0.20 times as much as the teacher's" in told


def test_motion_is_what_changes_over_frames():
    video = np.random.default_rng(0).standard_normal((2, 1, 3, 4, 5), np.float32)
    assert motion(jnp.asarray(video)) == 0
    moved = np.concatenate([video, video + 1, video - 1], axis=1)
    np.testing.assert_allclose(motion(jnp.asarray(moved)), 2 / 3, rtol=1e-5)


def poison(monkeypatch, is_bad) -> None:
    """Make clips that are not finite of the steps for which `is_bad(order, step)`."""
    feed = loop.feed

    def poisoned(dataset, config, start, mesh, order):
        for step, batch in enumerate(feed(dataset, config, start, mesh, order), start):
            factor = np.float32(np.nan if is_bad(order, step) else 1)
            yield {**batch, "latent_mean": batch["latent_mean"] * factor}

    monkeypatch.setattr(loop, "feed", poisoned)


def config_of(**train) -> dict:
    return {**CONFIG, "train": {**CONFIG["train"], "checkpoint_every": 2, **train}}


def run(config, workdir, teacher) -> dict:
    return loop.run_steps(config, workdir, MODEL, SCHEDULER, teacher, Clips())[0]


def test_steps_that_are_not_finite_are_skipped_and_the_run_ends_finite(
    teacher, tmp_path, monkeypatch
):
    poison(monkeypatch, lambda order, step: step in (1, 2, 5))
    state = run(config_of(), tmp_path, teacher)
    assert int(state["skipped"]["in_all"]) == 3
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(state))
    found = lines(tmp_path)
    assert [line["step"] for line in found if not np.isfinite(line["loss"])] == [1, 2, 5]
    assert [line["skipped"] for line in found] == [0, 1, 2, 2, 2, 3]
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())[0] == 4


def test_the_run_goes_back_and_another_order_helps(teacher, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, lambda order, step: order == 0 and step > 2)
    state = run(config_of(most_skipped=1), tmp_path, teacher)
    assert "back to step 2 with fresh data" in capsys.readouterr().out
    assert (int(state["order"]), int(state["step"]), int(state["skipped"]["in_all"])) == (1, 6, 0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(6))


def test_where_another_order_does_not_help_the_run_stops_with_the_reason(
    teacher, tmp_path, monkeypatch
):
    poison(monkeypatch, lambda order, step: step > 2)
    with pytest.raises(UserError, match=r"back 1 times did not help .*the loss is not: clips"):
        run(config_of(most_skipped=0, fresh_orders=1), tmp_path, teacher)


def test_without_a_checkpoint_there_is_no_way_back(teacher, tmp_path, monkeypatch):
    poison(monkeypatch, lambda order, step: True)
    with pytest.raises(UserError, match=r"more than 0 updates in a row .* going back 0 times"):
        run(config_of(most_skipped=0, fresh_orders=9), tmp_path, teacher)
