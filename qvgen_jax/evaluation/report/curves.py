"""Training curves, drawn from the records of metrics.jsonl."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from qvgen_jax.evaluation.report.figure import ACCENT, GREEN, MUTED, WARM, Phase, figure

RAW_POINTS = 600  # more are thinned to their envelope: the page stays small, spikes stay visible
SMOOTHING = 40  # the moving average spans 1/40 of the run
LEARNING_RATES = {
    "lr_weights": "weights",
    "lr_branch": "L, R",
    "lr_scales": "s, z",
    "lr_clips": "clips",
}


class Panel(NamedTuple):
    """One figure: `svg` is None when the run logged nothing for it."""

    title: str
    caption: str
    svg: str | None


def column(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values ([n] each, float64) of the records that hold a number under `key`."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return tuple(np.array(found, np.float64).reshape(-1, 2).T)


def phases(records: Sequence[dict]) -> list[Phase]:
    """The phases of rank decay, as logged; empty when no rank was logged."""
    steps, ranks = column(records, "rank")
    if not len(steps):
        return []
    starts = [0, *(np.flatnonzero(np.diff(ranks)) + 1)]
    ends = [*starts[1:], len(steps) - 1]
    return [Phase(steps[a], steps[b], int(ranks[a])) for a, b in zip(starts, ends, strict=True)]


def training_panels(records: Sequence[dict]) -> list[Panel]:
    """Loss, gradient norm, rank, gate, learning rates and small singular values over steps.

    And the held-out loss, of a run that was validated.
    """
    spans = phases(records)
    extent = (records[0]["step"], records[-1]["step"])
    average = (
        " Light: every logged step. Dark: moving average within a phase."
        if _window(len(column(records, "loss")[0])) > 1
        else ""
    )

    def panel(title: str, caption: str, keys: Sequence[str], draw: Callable) -> Panel:
        if not any(len(column(records, key)[0]) for key in keys):
            return Panel(title, caption, None)
        return Panel(
            title, caption, figure(title, caption, lambda ax: draw(ax, records), extent, spans)
        )

    held_out = panel(
        "Held-out loss",
        "Student against teacher on clips that training did not see, by the variance of the "
        "teacher’s prediction.",
        ["held_out_loss"],
        _held_out,
    )
    return [
        *([held_out] if held_out.svg else []),
        panel("Loss", f"Student against teacher, mean squared error.{average}", ["loss"], _loss),
        panel(
            "Gradient norm",
            "Before clipping, all parameters together; logarithmic.",
            ["grad_norm"],
            _gradient_norm,
        ),
        panel(
            "Rank",
            "Columns of the low-rank branch Φ that are left; fewer after every phase.",
            ["rank"],
            _rank,
        ),
        panel(
            "Gate",
            "Weight u of the columns of Φ that leave at the end of a phase.",
            ["gate"],
            _gate,
        ),
        panel("Learning rates", "Per parameter group; logarithmic.", [*LEARNING_RATES], _rates),
        panel(
            "Small singular values of Φ",
            "Share of Φ’s singular values more than 14 times below the first of their layer: "
            "directions that can go at little cost.",
            ["small_singular_share"],
            _small_share,
        ),
    ]


def _loss(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "loss")
    smooth = smooth_by_phase(steps, values, phases(records))
    _trace(ax, steps, values, smooth, ACCENT)
    finite = smooth[np.isfinite(smooth)]
    if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def _held_out(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "held_out_loss")
    ax.plot(steps, values, color=ACCENT, linewidth=1.8, **dots(len(steps)))
    ax.set_ylim(bottom=0)


def _gradient_norm(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "grad_norm")
    _trace(ax, steps, values, smooth_by_phase(steps, values, phases(records)), ACCENT)
    if (values > 0).any():
        ax.set_yscale("log")


def _rank(ax, records: Sequence[dict]) -> None:
    steps, ranks = column(records, "rank")
    level = np.where(ranks > 0, np.log2(np.maximum(ranks, 1)) + 1, 0)  # 0, 1, 2, 4, ... evenly
    ax.step(steps, level, where="post", color=ACCENT, linewidth=1.8)
    present = sorted({int(rank) for rank in ranks} | {0})
    ax.set_yticks([math.log2(rank) + 1 if rank else 0 for rank in present], map(str, present))
    ax.set_ylim(-0.25, max(level.max(), 1) + 0.4)


def _gate(ax, records: Sequence[dict]) -> None:
    """One falling line per phase; without a rank left there is nothing to weigh."""
    present = [record for record in records if record.get("rank") != 0]
    for span in phases(present) or [Phase(-math.inf, math.inf, -1)]:
        steps, values = column([r for r in present if r.get("rank", -1) == span.rank], "gate")
        ax.plot(steps, values, color=ACCENT, linewidth=1.8, **dots(len(steps)))
    ax.set_ylim(-0.04, 1.06)
    ax.set_yticks([0, 0.5, 1], ["0", "½", "1"])


def _rates(ax, records: Sequence[dict]) -> None:
    groups: dict[bytes, tuple[list[str], np.ndarray, np.ndarray]] = {}
    for key, label in LEARNING_RATES.items():
        steps, values = column(records, key)
        if len(values) and np.nanmax(values) > 0:
            same = values.tobytes() + steps.tobytes()
            groups.setdefault(same, ([], steps, values))[0].append(label)
    peaks = [values.max() for _, _, values in groups.values()]
    floor = min(peaks, default=1e-5) / 30
    for (labels, steps, values), color in zip(
        groups.values(), (ACCENT, GREEN, WARM, MUTED), strict=False
    ):
        ax.plot(steps, np.maximum(values, floor / 10), color=color, linewidth=1.8)
        peak = values.max()
        x = steps[0] + 0.3 * (steps[-1] - steps[0])
        ax.text(x, peak * 1.35, "; ".join(labels), color=color, ha="left", va="bottom")
    ax.set_yscale("log")
    ax.set_ylim(floor, max(peaks, default=1e-4) * 6)


def _small_share(ax, records: Sequence[dict]) -> None:
    steps, shares = column(records, "small_singular_share")
    ax.plot(steps, 100 * shares, color=ACCENT, linewidth=1.8)
    ax.set_ylim(-3, 106)
    ax.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])


def _trace(ax, steps, values, smooth, color: str) -> None:
    ax.plot(*_thin(steps, values), color=color, linewidth=0.8, alpha=0.32)
    ax.plot(steps, smooth, color=color, linewidth=1.8)


def dots(count: int) -> dict:
    """Few points are shown as such, so that nobody reads the line between them as measured."""
    return {"marker": "o", "markersize": 3} if count <= 10 else {}


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most RAW_POINTS points: each bin keeps its least and its greatest value."""
    if len(steps) <= RAW_POINTS or not np.isfinite(values).all():
        return steps, values
    kept = []
    for chunk in np.array_split(np.arange(len(steps)), RAW_POINTS // 2):
        kept += sorted({chunk[values[chunk].argmin()], chunk[values[chunk].argmax()]})
    return steps[kept], values[kept]


def _window(count: int) -> int:
    return max(1, count // SMOOTHING)


def smooth_by_phase(steps, values, spans: Sequence[Phase]) -> np.ndarray:
    """Centred moving average that never mixes two phases: the jump at a boundary stays a jump."""
    window = _window(len(steps))
    smooth = np.full(len(values), np.nan)
    starts = np.searchsorted(steps, [span.start for span in spans]).tolist() or [0]
    starts[0] = 0
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        part = values[start:end]
        ones = np.ones(min(window, max(len(part), 1)))
        total = np.convolve(part, ones, "same")
        smooth[start:end] = total / np.convolve(np.ones(len(part)), ones, "same")
    return smooth
