"""Rank and gate as functions of the step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.quant.schedule import (
    RankDecay,
    fade_at,
    gate_at,
    is_boundary,
    phase_steps_for,
    rank_at,
)

DECAY = RankDecay(phase_steps=10)


def test_rank_halves_at_multiples_of_the_phase_down_to_zero():
    assert [int(rank_at(10 * phase, DECAY)) for phase in range(8)] == [32, 16, 8, 4, 2, 1, 0, 0]
    assert [int(rank_at(10 * phase + 9, DECAY)) for phase in range(7)] == [32, 16, 8, 4, 2, 1, 0]
    assert DECAY.end == 60


def test_boundaries_are_where_the_rank_changes():
    changes = [s for s in range(1, 100) if int(rank_at(s, DECAY)) != int(rank_at(s - 1, DECAY))]
    assert changes == [s for s in range(100) if is_boundary(s, DECAY)]


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_fade_starts_at_one_and_is_a_half_in_the_middle(shape):
    decay = RankDecay(phase_steps=10, shape=shape)
    np.testing.assert_allclose([fade_at(20, decay), fade_at(25, decay)], [1, 0.5], atol=1e-6)


def test_gate_keeps_half_fades_half_and_closes_the_dead():
    gate = np.asarray(gate_at(15, DECAY))
    np.testing.assert_array_equal(gate[:8], 1)
    np.testing.assert_allclose(gate[8:16], 0.5, atol=1e-6)
    np.testing.assert_array_equal(gate[16:], 0)
    np.testing.assert_allclose(gate_at(55, DECAY)[:2], [0.5, 0], atol=1e-6)
    np.testing.assert_array_equal(gate_at(60, DECAY), 0)


def test_gate_is_one_compilation_for_all_phases():
    traces = []

    @jax.jit
    def gate(step):
        traces.append(step)
        return gate_at(step, DECAY)

    assert [int(jnp.sum(gate(s) > 0)) for s in (0, 10, 20, 59, 60)] == [32, 16, 8, 1, 0]
    assert len(traces) == 1


def test_decay_ends_at_a_fraction_of_training():
    steps = phase_steps_for(1000, 0.6, 32)
    assert steps == 100
    assert int(rank_at(600, RankDecay(steps))) == 0
    assert int(rank_at(599, RankDecay(steps))) == 1


def test_impossible_schedules_say_why():
    with pytest.raises(UserError, match="less than one step for each of the 6 phases"):
        phase_steps_for(5, 1.0, 32)
    with pytest.raises(UserError, match=r"decay_fraction=1\.5"):
        phase_steps_for(100, 1.5, 32)
    with pytest.raises(UserError, match="shape='cubic'"):
        RankDecay(10, shape="cubic")


def test_an_abrupt_end_is_one_phase_at_full_weight():
    decay = RankDecay(phase_steps=phase_steps_for(100, 0.9, 32, shape="abrupt"), shape="abrupt")
    assert (decay.ranks, decay.end) == ((32, 0), 90)
    np.testing.assert_array_equal(gate_at(89, decay), 1)
    np.testing.assert_array_equal(gate_at(90, decay), 0)
    assert [s for s in range(100) if is_boundary(s, decay)] == [90]


def test_an_unknown_shape_or_order_is_named():
    with pytest.raises(UserError, match="shape='cosine', order='middle'; expected one of cosine"):
        RankDecay(1, order="middle")
