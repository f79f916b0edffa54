"""Intervals that go with every score: how much of a difference could be luck."""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate with its lower and upper end."""

    value: float
    low: float
    high: float


def wilson(successes: int, count: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; it stays inside [0, 1] and works at 0 and at 1.

    Raises:
        ValueError: `count` is not positive, or `successes` is not between 0 and `count`.
    """
    if count <= 0 or not 0 <= successes <= count:
        raise ValueError(f"wilson needs 0 <= successes <= count > 0, got {successes} of {count}")
    z = NormalDist().inv_cdf(0.5 + level / 2)
    share = successes / count
    centre = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * (share * (1 - share) / count + z**2 / (4 * count**2)) ** 0.5
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def _pairs(what: str, ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both in float64, seen to be equal `[pairs]`."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not len(ours):
        raise ValueError(f"{what} needs two equal [pairs] arrays, got {ours.shape}, {theirs.shape}")
    return ours, theirs


def _bootstrap(value: float, drawn: np.ndarray, level: float) -> Interval:
    """The estimate between the percentiles of its resampled values."""
    low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2])
    return Interval(float(value), float(low), float(high))


def paired_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of `ours - theirs` over pairs, with its percentile bootstrap interval.

    Args:
        ours, theirs: `[pairs]` scores (or booleans) of the same prompts with the same noise.
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many times the pairs are drawn again, with replacement.
        level: the share of resampled means that lie inside.

    Raises:
        ValueError: the two differ in shape, are not one-dimensional, or are empty.
    """
    ours, theirs = _pairs("paired_difference", ours, theirs)
    difference = ours - theirs
    rng = np.random.default_rng(seed)
    # Resampling counts of the few distinct values is the same draw as resampling the pairs.
    values, counts = np.unique(difference, return_counts=True)
    drawn = rng.multinomial(len(difference), counts / len(difference), size=resamples)
    means = drawn @ values / len(difference)
    return _bootstrap(difference.mean(), means, level)


def paired_ratio(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of `ours` by mean of `theirs`, over pairs, with its percentile bootstrap interval.

    Both means are of the same drawn pairs: what is everywhere worse by the same share has an
    interval of that one point.

    Args:
        ours, theirs: `[pairs]` positive scores of the same clips with the same noise.
        seed, resamples, level: as in `paired_difference`.

    Raises:
        ValueError: the two differ in shape, are not one-dimensional, or are empty.
    """
    ours, theirs = _pairs("paired_ratio", ours, theirs)
    count, rng = len(ours), np.random.default_rng(seed)
    drawn = rng.multinomial(count, np.full(count, 1 / count), size=resamples)
    return _bootstrap(ours.mean() / theirs.mean(), drawn @ ours / (drawn @ theirs), level)


def crossed_difference(
    ours: np.ndarray,
    theirs: np.ndarray,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Mean of `ours - theirs` over training seeds and videos, both of which are samples.

    All students answer the same prompts with the same noise, so scores are correlated along both
    axes. Training seeds and videos are therefore drawn again separately, and every drawn seed meets
    every drawn video (the pigeonhole bootstrap, Owen 2007, arXiv 0712.1111, which errs on the wide
    side). With three seeds the first axis has few distinct draws: its part is rough.

    Args:
        ours: `[seeds, videos]` scores of students that differ in their training seed.
        theirs: `[seeds, videos]` of others with the same seeds, or `[videos]` of one reference.
        seed, resamples, level: as in `paired_difference`.

    Raises:
        ValueError: the shapes do not match, or there is nothing in them.
    """
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if ours.ndim != 2 or not ours.size or theirs.shape not in (ours.shape, ours.shape[1:]):
        raise ValueError(
            f"crossed_difference needs [seeds, videos] and the same or [videos], got {ours.shape}, "
            f"{theirs.shape}"
        )
    difference = ours - theirs
    seeds, videos = difference.shape
    rng = np.random.default_rng(seed)
    drawn_seeds = rng.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    drawn_videos = rng.multinomial(videos, np.full(videos, 1 / videos), size=resamples) / videos
    means = np.einsum("rs,sv,rv->r", drawn_seeds, difference, drawn_videos, optimize=True)
    return _bootstrap(difference.mean(), means, level)
