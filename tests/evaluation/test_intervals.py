import numpy as np
import pytest

from qvgen_jax.evaluation.intervals import (
    crossed_difference,
    paired_difference,
    paired_ratio,
    wilson,
)


def test_wilson_agrees_with_the_textbook():
    # Newcombe (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29.
    for successes, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        interval = wilson(successes, count)
        assert interval[1:] == pytest.approx((low, high), abs=5e-5)


def test_wilson_refuses_impossible_counts():
    with pytest.raises(ValueError, match="5 of 4"):
        wilson(5, 4)


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        theirs = rng.random(120) < 0.8
        ours = np.where(rng.random(120) < 0.9, theirs, rng.random(120) < 0.5)
        interval = paired_difference(ours, theirs, seed=trial, resamples=1000)
        covered += interval.low <= 0.1 * (0.5 - 0.8) <= interval.high
    # 200 trials at 95 %: four standard deviations are 6 points, and percentiles cover a bit less.
    assert covered / 200 > 0.87


def test_the_paired_interval_is_seeded_and_empty_of_luck_when_all_pairs_agree():
    scores = np.array([1, 0, 1, 1, 0], bool)
    assert paired_difference(scores, scores) == (0.0, 0.0, 0.0)
    other = np.array([1, 1, 0, 1, 0], bool)
    assert paired_difference(scores, other, seed=3) == paired_difference(scores, other, seed=3)


def test_unpaired_scores_are_refused():
    with pytest.raises(ValueError, match=r"\(3,\), \(2,\)"):
        paired_difference(np.ones(3), np.ones(2))
    with pytest.raises(ValueError, match=r"\(3,\), \(2,\)"):
        paired_ratio(np.ones(3), np.ones(2))


def test_a_ratio_is_of_the_same_draws_and_covers_the_true_one():
    rng = np.random.default_rng(1)
    theirs = rng.lognormal(size=60)
    assert paired_ratio(1.2 * theirs, theirs) == pytest.approx((1.2, 1.2, 1.2))
    covered = 0
    for trial in range(200):
        theirs = rng.lognormal(size=60)
        ours = 1.2 * theirs * rng.uniform(0.8, 1.2, 60)
        interval = paired_ratio(ours, theirs, seed=trial, resamples=1000)
        covered += interval.low <= 1.2 <= interval.high
    assert covered / 200 > 0.87  # As above.


def test_crossed_difference_of_one_seed_is_the_paired_one():
    rng = np.random.default_rng(3)
    ours, theirs = rng.random(200) < 0.7, rng.random(200) < 0.9
    crossed = crossed_difference(ours[None], theirs)
    paired = paired_difference(ours, theirs)
    assert crossed.value == paired.value
    np.testing.assert_allclose(crossed, paired, atol=0.01)  # Other draws of the same resampling.


def test_crossed_difference_knows_the_variance_of_both_axes():
    """Independent effects of seed and video: the standard errors add as squares."""
    rng = np.random.default_rng(4)
    seeds, videos = 40, 60
    scores = rng.normal(0, 1, (seeds, 1)) + rng.normal(0, 2, (1, videos))
    found = crossed_difference(scores, np.zeros(videos))
    error = np.sqrt(scores.mean(1).var() / seeds + scores.mean(0).var() / videos)
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(error, rel=0.05)
    assert found == crossed_difference(scores, np.zeros((seeds, videos)))


def test_crossed_difference_refuses_other_shapes():
    for ours, theirs in ((np.ones(3), np.ones(3)), (np.ones((2, 3)), np.ones(2))):
        with pytest.raises(ValueError, match=r"needs \[seeds, videos\]"):
            crossed_difference(ours, theirs)
