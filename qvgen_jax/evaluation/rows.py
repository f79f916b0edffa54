"""From what was measured video by video to a line of the table: means with their intervals."""

import math
from collections.abc import Mapping

import numpy as np

from qvgen_jax.evaluation.answers import SCORES
from qvgen_jax.evaluation.intervals import Interval, paired_difference, paired_ratio, wilson

Arrays = Mapping[str, np.ndarray]


def row(
    name: str, found: Arrays, distance: Arrays | None, reference: Arrays, weights_bytes: int
) -> dict:
    """One variant of `evaluation.json`.

    Where the judge knows the prompts: shares with intervals, and `strict_videos`, which has a
    character per video, 1 where it is strictly right, for paired comparisons between runs.

    Args:
        name: of the variant.
        found: its answers, of `answers.read`.
        distance: to full precision, likewise; None for full precision itself.
        reference: full precision's answers.
        weights_bytes: that its transformer holds.
    """
    line = {"name": name, "strict_difference": None, "latent_difference": None, "metrics": None}
    if "strict" in found:
        line |= {key: _share(found[key]) for key in SCORES}
        line["strict_videos"] = "".join("01"[int(hit)] for hit in found["strict"])
        if distance is not None:
            paired = paired_difference(found["strict"], reference["strict"])
            line["strict_difference"] = _told(paired)
    if distance is not None:
        gap = np.linalg.norm(distance["gap"]) / np.linalg.norm(distance["norm"])
        line["latent_difference"] = round(float(gap), 4)
        line["metrics"] = _metrics(found, distance, reference)
    line["speed"] = _speed(found, reference, weights_bytes)
    line["seconds_per_video"] = line["speed"]["seconds_per_video"]
    return line


def _share(hits: np.ndarray) -> dict:
    interval = wilson(int(hits.sum()), len(hits))
    return {
        "count": int(hits.sum()),
        "total": len(hits),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
    }


def _metrics(found: Arrays, distance: Arrays, reference: Arrays) -> dict:
    """Means over videos; null where videos are single frames, full precision's stand still, or
    pixels were not compared."""
    steady, before = found["consistency"], reference["consistency"]
    moves = np.isfinite(steady).all()
    ratio = moves and reference["motion"].all()
    return {
        "psnr": _told(_mean(distance["psnr"])) if "psnr" in distance else None,
        "ssim": _told(_mean(distance["ssim"])) if "ssim" in distance else None,
        "consistency": _told(_mean(steady)) if moves else None,
        "consistency_difference": _told(paired_difference(steady, before), 6) if moves else None,
        "motion": _told(paired_ratio(found["motion"], reference["motion"])) if ratio else None,
    }


def _mean(values: np.ndarray) -> Interval:
    return paired_difference(values, np.zeros_like(values))


def _told(estimate: Interval, digits: int = 4) -> dict:
    low, high = round(estimate.low, digits), round(estimate.high, digits)
    return {"mean": round(estimate.value, digits), "interval": [low, high]}


def _seconds(found: Arrays) -> float:
    """Median over slices; without those that compile, where there are others."""
    warm = found["warm"].astype(bool)
    return float(np.median(found["seconds"][warm] if warm.any() else found["seconds"]))


def _speed(found: Arrays, reference: Arrays, weights_bytes: int) -> dict:
    """The ratio is of equals: null where a device, or counting the compilation, differs."""
    ours, theirs = _seconds(found), _seconds(reference)
    places = {*found["device"].tolist(), *reference["device"].tolist()}
    fair = len(places) == 1 and found["warm"].any() == reference["warm"].any()
    peak = int(found["peak_bytes"].max())
    return {
        "seconds_per_video": _digits(ours),
        "ratio_to_reference": _digits(ours / theirs) if fair else None,
        "weights_bytes": weights_bytes,
        "peak_bytes": peak if peak >= 0 else None,
    }


def _digits(value: float) -> float:
    """Four of them."""
    return round(value, 3 - math.floor(math.log10(value))) if value else 0.0
