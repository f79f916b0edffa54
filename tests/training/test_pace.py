"""What a step is counted as, its share of the peak, and traces of a few steps."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from configs import read_config
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.training import pace as pace_module
from qvgen_jax.training.pace import SPEED, Pace, Work, mean_work, work_of
from qvgen_jax.training.profile import Profile


def test_a_step_of_the_real_14b_by_hand():
    config = read_config("configs/wan14b_w4a4.py").to_dict()
    work = work_of(config, PUBLISHED[config["model"]], (13, 60, 104, 16))
    assert work.tokens == 64 * 20280
    # Four forwards' worth (teacher, student, twice for its gradients) of the weights that video
    # tokens meet, six squares and the feed-forward's, and of two products of attention.
    linears = 2 * 40 * (6 * 5120**2 + 2 * 5120 * 13824) * 20280
    attention = 40 * 4 * 20280 * (20280 + 512) * 5120
    assert work.operations == pytest.approx(4 * 64 * (linears + attention), rel=0.02)
    assert work.peak == 0  # A CPU's is not known.


def test_steps_of_several_sizes_are_counted_on_average():
    config = read_config("configs/wan1_3b_w4a4.py").to_dict()
    model, wide, small = PUBLISHED[config["model"]], (13, 60, 104, 16), (5, 60, 60, 16)
    works = [work_of(config, model, shape) for shape in (wide, small)]
    found = mean_work(config, model, {wide: 3, small: 1})
    assert found.tokens == round((3 * works[0].tokens + works[1].tokens) / 4)
    assert found.operations == pytest.approx(
        (3 * works[0].operations + works[1].operations) / 4, rel=1e-12
    )


def test_the_share_of_the_peak_is_told_where_it_is_known():
    for peak, names in ((0, 3), (1e15, 4)):
        pace = Pace(3, Work(tokens=1000, operations=1e12, peak=peak))
        told = pace(5)
        assert len(told) == names
        assert set(told) <= set(SPEED)
        assert told["tokens_per_second"] == pytest.approx(1000 * told["steps_per_second"], rel=0.01)


def test_what_lies_between_steps_is_left_out(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(pace_module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    pace = Pace(10, Work(tokens=1, operations=1.0, peak=0))

    def late():
        while True:
            clock.now += 0.5
            yield clock.now

    data = late()
    assert pace.next_of(data, None) == 0.5
    assert pace.next_of(data, SimpleNamespace(is_ready=lambda: False)) == 1.0
    clock.now = 2.0
    assert pace(14)["steps_per_second"] == 2
    assert pace(14)["data_wait"] == 0.25
    clock.now = 5.0  # Three seconds of logging.
    pace.restart(14)
    clock.now = 6.0
    assert pace(18)["steps_per_second"] == 4
    assert pace(18)["data_wait"] == 0


@pytest.mark.parametrize(("count", "traced"), [(0, False), (1, True)])
def test_a_trace_is_written_of_warm_steps_alone(tmp_path, count, traced):
    with Profile(tmp_path, 7, count) as profile:
        for step in range(7, 11):
            profile.before(step)
            jax.block_until_ready(jnp.ones(3) + step)
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == traced
