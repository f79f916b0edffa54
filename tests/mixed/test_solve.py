"""Plans against all there are, and what they cost."""

import itertools

import numpy as np
import pytest

from kernels.chips import CHIPS
from qvgen_jax.errors import UserError
from qvgen_jax.mixed.candidates import Candidate, parse_candidates
from qvgen_jax.mixed.costs import layer_costs, parse_budget
from qvgen_jax.mixed.scan import layer_targets
from qvgen_jax.mixed.solve import solve
from qvgen_jax.models.linears import Linear
from qvgen_jax.quant.blocks import segments_of
from qvgen_jax.quant.config import QuantConfig

NAMES = ("blocks.ffn.up", "blocks.ffn.down", "proj_out")
LAYERS = tuple(layer_targets(NAMES, 3))
OPTIONS = parse_candidates("w3a3,w4a4,w8a8")
LINEARS = [
    Linear("blocks.ffn.up", 3, 100, 8, 32),
    Linear("blocks.ffn.down", 3, 100, 32, 8),
    Linear("proj_out", 1, 100, 8, 5),
]
COSTS = layer_costs(LAYERS, LINEARS, OPTIONS, "bits", CHIPS["cpu"])


def damages(seed):
    """Damage falls with bits, by another amount in each layer."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.lognormal(0, 2, (len(LAYERS), len(OPTIONS))), axis=1)[:, ::-1]


def segments(chosen):
    bits = {name: tuple(OPTIONS[place]) for name, place in zip(LAYERS, chosen, strict=True)}
    return len(segments_of(QuantConfig(bits=bits), NAMES, 3, most=99))


def best(damage, most, allowed):
    rows = np.arange(len(LAYERS))
    return min(
        damage[rows, chosen].sum()
        for chosen in map(list, itertools.product(range(len(OPTIONS)), repeat=len(LAYERS)))
        if COSTS[rows, chosen].sum() <= most and segments(chosen) <= allowed
    )


@pytest.mark.parametrize(
    ("seed", "most", "allowed"), [(0, 5.0, 3), (1, 5.0, 1), (2, 4.0, 2), (3, 6.5, 2)]
)
def test_no_plan_within_the_budget_and_the_segments_has_less_damage(seed, most, allowed):
    damage = damages(seed)
    found = solve(LAYERS, OPTIONS, damage, COSTS, most, allowed)
    rows = np.arange(len(LAYERS))
    # The solver stops within 1e-6 of the best.
    assert found.damage == pytest.approx(best(damage, most, allowed), rel=1e-5)
    assert found.bound == pytest.approx(found.damage, rel=1e-5)
    assert COSTS[rows, found.chosen].sum() <= most * (1 + 1e-6)
    assert segments(found.chosen) <= allowed


def test_a_layer_that_dwarfs_all_others_costs_no_precision():
    damage = damages(2)
    damage[0] = damage[0, ::-1].max() * 1e7, 1e6, 1e-3
    found = solve(LAYERS, OPTIONS, damage, COSTS, 5.0, 3)
    assert found.chosen[0] == 2
    assert found.damage == pytest.approx(best(damage, 5.0, 3), rel=1e-5)
    assert found.bound == pytest.approx(found.damage, rel=1e-5)
    assert not found.timed_out


def test_a_budget_below_the_cheapest_plan_is_refused():
    with pytest.raises(UserError, match=r"2 is less than the cheapest options need, 3; raise it"):
        solve(LAYERS, OPTIONS, damages(0), COSTS, 2.0)


def test_all_layers_alike_cost_what_their_bits_say():
    assert COSTS.sum(0) == pytest.approx([3, 4, 8])
    bops = layer_costs(LAYERS, LINEARS, OPTIONS, "bops", CHIPS["cpu"])
    assert bops.sum(0) == pytest.approx([9, 16, 64])
    megabytes = layer_costs(LAYERS, LINEARS, OPTIONS, "MB", CHIPS["cpu"])
    weights = 3 * 2 * 8 * 32 + 8 * 5
    assert megabytes.sum(0)[1:] == pytest.approx([weights / 2e6, weights / 1e6])


def test_time_counts_what_the_chip_s_units_and_memory_make_of_the_bits():
    on_tpu = layer_costs(LAYERS, LINEARS, OPTIONS, "ms", CHIPS["v5e"])
    assert np.all(on_tpu[:, 0] == on_tpu[:, 1])  # 3-bit codes lie and multiply as 4-bit ones.
    assert np.all(on_tpu[:, 1] < on_tpu[:, 2])
    with pytest.raises(UserError, match=r"chip with known peaks, .* name one by --target"):
        layer_costs(LAYERS, LINEARS, OPTIONS, "ms", CHIPS["cpu"])


@pytest.mark.parametrize(
    ("text", "most", "unit"), [("5bits", 5, "bits"), ("1.5 MB", 1.5, "MB"), (" 20BOPs", 20, "bops")]
)
def test_a_budget_is_a_number_and_a_unit(text, most, unit):
    assert parse_budget(text) == (most, unit)


@pytest.mark.parametrize("text", ["", "5", "bits", "5 apples", "-3bits", "0ms", "1e3MB"])
def test_another_budget_is_refused_with_examples(text):
    with pytest.raises(UserError, match=r"expected a number and one of bits, MB, bops, ms"):
        parse_budget(text)


def test_candidates_are_bits_of_both_operands_or_of_one():
    assert parse_candidates("W4A4, w3,a8") == (Candidate(4, 4), Candidate(3, 0), Candidate(0, 8))
    assert [each.name for each in parse_candidates("w3a8,a4")] == ["w3a8", "a4"]
    for text in ("", "w9a4", "w4a4,,", "4", "w4a1", "a4w4"):
        with pytest.raises(UserError, match="expected w4a4, w4"):
            parse_candidates(text)
    with pytest.raises(UserError, match="names one twice"):
        parse_candidates("w4a4,w4a4")
