"""What the records of a study say about its variants, as numbers with intervals."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from qvgen_jax.evaluation.intervals import (
    Interval,
    crossed_difference,
    paired_ratio,
    wilson,
)

DEFAULT = "default"


def at_bits(records: Sequence[Mapping], bits: Sequence[int]) -> dict[str, dict[int, Mapping]]:
    """Variant -> training seed -> record, of one bit-width."""
    found: dict[str, dict[int, Mapping]] = {}
    for record in records:
        if tuple(record["bits"]) == tuple(bits):
            found.setdefault(record["variant"], {})[record["seed"]] = record
    return found


def bits_of(records: Sequence[Mapping]) -> list[tuple[int, int]]:
    """The bit-widths there are, most bits first."""
    return sorted({tuple(record["bits"]) for record in records}, reverse=True)


def held_out_loss(record: Mapping) -> float:
    """Distillation loss on held-out clips by the variance of the target; NaN if not measured."""
    measured = record["held_out"]
    return math.nan if measured is None else _number(measured["mean"]["normalised"])


def drift(record: Mapping) -> float:
    """How far final latents are from full precision's by its norm, mean over videos; NaN if not
    measured."""
    if record["drift"] is None or None in record["drift"]["per_video"]:
        return math.nan
    return float(np.mean(record["drift"]["per_video"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def change(
    ours: Mapping[int, Mapping], theirs: Mapping[int, Mapping], what: str
) -> Interval | None:
    """By what share a measure is above (or below) another variant's, paired.

    Args:
        ours, theirs: seed -> record; the seeds that both have are compared.
        what: "held_out", clip by clip, or "drift", video by video.

    Returns:
        Of the means of both over seeds, clips or videos, with the bootstrap interval over clips or
        videos; training luck is not in it. None where nothing can be compared.
    """
    key = {"held_out": "per_clip", "drift": "per_video"}[what]
    pairs = [
        (ours[seed][what][key], theirs[seed][what][key])
        for seed in sorted(set(ours) & set(theirs))
        if ours[seed][what] and theirs[seed][what]
    ]
    if not pairs or any(None in values for pair in pairs for values in pair):
        return None
    mine = np.mean([pair[0] for pair in pairs], axis=0)
    others = np.mean([pair[1] for pair in pairs], axis=0)
    return Interval(*(part - 1 for part in paired_ratio(mine, others)))


# Two runs of one recipe differ by less than this many of its standard deviations 19 times in 20:
# 1.96 sqrt(2).
_DEVIATIONS = 2.8


def luck(records: Sequence[Mapping]) -> tuple[float, int] | None:
    """How far two runs that differ in nothing but their seed may be apart in held-out loss.

    Returns:
        2.8 standard deviations of the default's seeds by their mean, pooled over bit-widths, and
        the degrees of freedom behind that; None where no bit-width has two seeds.
    """
    squares, freedom = 0.0, 0
    for bits in bits_of(records):
        runs = at_bits(records, bits).get(DEFAULT, {}).values()
        losses = np.array([loss for loss in map(held_out_loss, runs) if math.isfinite(loss)])
        if len(losses) > 1:
            squares += float(np.square(losses / losses.mean() - 1).sum())
            freedom += len(losses) - 1
    return (_DEVIATIONS * math.sqrt(squares / freedom), freedom) if freedom else None


def seeds_shown(variants: Mapping[str, Mapping]) -> dict[str, list[int]]:
    """Of each variant the training seeds that it shares with the default, else all of its own.

    Of the default those that any other variant shares: its row is what theirs are compared with.
    """
    default = set(variants.get(DEFAULT, ()))
    shown = {name: sorted(default & set(runs)) or sorted(runs) for name, runs in variants.items()}
    shared = {seed for name in variants if name != DEFAULT for seed in shown[name]} & default
    return shown | ({DEFAULT: sorted(shared)} if shared else {})


def screening_rows(records: Sequence[Mapping], bits: Sequence[int]) -> list[dict]:
    """One row per variant of a bit-width, by its held-out loss to the default's, best first.

    Columns are means over `seeds_shown`, which changes are paired by.
    Variants that cannot be compared come next, diverged ones last.
    """
    variants = at_bits(records, bits)
    default = variants.get(DEFAULT, {})
    seeds = seeds_shown(variants)
    rows = []
    for name, every in variants.items():
        runs = {seed: every[seed] for seed in seeds[name]}
        measured = list(runs.values())
        motions = [record["drift"]["motion"] for record in measured if record["drift"]]
        rows.append(
            {
                "variant": name,
                "seeds": len(runs),
                "loss": _mean(map(held_out_loss, measured)),
                "loss_change": None if name == DEFAULT else change(runs, default, "held_out"),
                "drift": _mean(map(drift, measured)),
                "drift_change": None if name == DEFAULT else change(runs, default, "drift"),
                "motion": _mean(map(_number, motions)),
                "steps": measured[0]["config"]["train.steps"],
                "seconds_per_step": _mean(
                    _number(record["seconds_per_step"]["mean"]) for record in measured
                ),
            }
        )
    return sorted(rows, key=_place)


def _place(row: Mapping) -> tuple:
    found = row["loss_change"]
    change_of_row = 0.0 if row["variant"] == DEFAULT else math.inf if found is None else found.value
    return math.isnan(row["loss"]), change_of_row, row["loss"]


def _mean(values) -> float:
    values = list(values)
    return float(np.mean(values)) if values else math.nan


def standing(records: Sequence[Mapping], widths: Sequence[Sequence[int]]) -> dict[str, float]:
    """Variant -> its held-out loss by the default's, geometric mean over bit-widths; low is good.

    The loss is pure distillation's, so it favours what trains on nothing else.

    Args:
        records: of one stage.
        widths: the bit-widths that count; variants that lack one are left out, and so are training
            seeds that the default lacks. One whose loss is not finite stands last.
    """
    ratios: dict[str, list[float]] = {}
    for bits in widths:
        variants = at_bits(records, bits)
        default = variants.get(DEFAULT, {})
        for name, runs in variants.items():
            seeds = sorted(set(runs) & set(default))
            if not seeds:
                continue
            mine, theirs = (
                _mean(held_out_loss(those[seed]) for seed in seeds) for those in (runs, default)
            )
            ratios.setdefault(name, []).append(mine / theirs)
    return {
        name: math.inf if math.isnan(sum(found)) else float(np.exp(np.mean(np.log(found))))
        for name, found in ratios.items()
        if len(found) == len(widths)
    }


def _verdicts(record: Mapping, which: int) -> np.ndarray:
    """Strict verdicts `[videos]`: of full precision (0) or of the student (-1)."""
    return np.array([int(hit) for hit in record["judge"][which]["strict_videos"]])


def final_rows(
    records: Sequence[Mapping], bits: Sequence[int], references: Sequence[str] = (DEFAULT,)
) -> list[dict]:
    """One row per judged variant of a bit-width, most videos strictly right first.

    `strict` is Wilson's interval over all videos of all seeds, as if they were independent; the
    paired differences, to full precision and to every reference, treat seeds and videos as crossed.
    """
    judged = [record for record in records if record["judge"]]
    variants = at_bits(judged, bits)
    rows = []
    for name, runs in variants.items():
        measured = [runs[seed] for seed in sorted(runs)]
        hits = np.stack([_verdicts(record, -1) for record in measured])
        teacher = _verdicts(measured[0], 0)
        gaps = [record["judge"][-1]["latent_difference"] for record in measured]
        rows.append(
            {
                "variant": name,
                "seeds": len(runs),
                "count": int(hits.sum()),
                "total": hits.size,
                "strict": wilson(int(hits.sum()), hits.size),
                "to_full_precision": crossed_difference(hits, teacher),
                "to": {
                    reference: _strict_difference(runs, variants.get(reference, {}))
                    for reference in references
                    if reference != name
                },
                "latents": (float(np.mean(gaps)), min(gaps), max(gaps)),
                "export_bytes": measured[0]["sizes"]["transformer_export_bytes"],
            }
        )
    return sorted(rows, key=lambda row: (-row["strict"].value, row["variant"]))


def _strict_difference(
    runs: Mapping[int, Mapping], those: Mapping[int, Mapping]
) -> Interval | None:
    """Of two variants over the training seeds that both have; None where they share none."""
    shared = sorted(set(runs) & set(those))
    if not shared:
        return None
    mine, theirs = (
        np.stack([_verdicts(each[seed], -1) for seed in shared]) for each in (runs, those)
    )
    return crossed_difference(mine, theirs)


def full_precision(records: Sequence[Mapping]) -> tuple[Interval, int, int] | None:
    """The teacher's strict share, count and videos, if any cell was judged."""
    judged = next((record for record in records if record["judge"]), None)
    if judged is None:
        return None
    hits = _verdicts(judged, 0)
    return wilson(int(hits.sum()), hits.size), int(hits.sum()), hits.size
