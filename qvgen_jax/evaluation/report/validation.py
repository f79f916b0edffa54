"""Held-out error while training, bucket by bucket of the timestep, from `validation.jsonl`."""

from collections.abc import Mapping, Sequence

import numpy as np

from qvgen_jax.evaluation.report.curves import Panel, dots, phases
from qvgen_jax.evaluation.report.figure import ACCENT, Phase, figure
from qvgen_jax.evaluation.report.gallery import Shelf, validation_videos
from qvgen_jax.evaluation.report.training import panels_grid
from qvgen_jax.evaluation.report.words import missing

MEASURES = {
    "relative": (
        "Relative error",
        "Norm of student minus teacher by the teacher’s norm, mean over held-out clips.",
    ),
    "normalised": (
        "Normalised error",
        "Mean squared difference by the variance of the teacher’s prediction.",
    ),
    "cosine": ("Cosine", "Between the student’s and the teacher’s prediction; 1 is the same."),
}
DRIFT = (
    "Drift",
    "Final latents of whole videos, from the same noise: norm of the difference by the teacher’s "
    "norm.",
)
NAME_HEIGHT = 0.075  # Of the axes.

Line = tuple[list[int], list[float]]
"""Steps and values."""


def validation_section(validations: Sequence[dict], records: Sequence[dict], shelf: Shelf) -> str:
    """Curves by timestep bucket with the run's phases, and the videos of several steps.

    Args:
        validations: of `read_validation`.
        records: of `read_metrics`; they give the phases.
        shelf: where videos are copied to.
    """
    if not validations:
        return missing(
            "The run was not validated while it trained (<code>validation.jsonl</code> is missing)."
        )
    spans = phases(records)
    panels = [
        Panel(*texts, _curve(lines_by_timestep(validations, key), key, texts, spans))
        for key, texts in MEASURES.items()
    ]
    if drift := _drift(validations):
        panels.append(Panel(*DRIFT, _curve({"": drift}, "drift", DRIFT, spans)))
    return (
        "<p>Student against teacher on clips that training did not see, at fixed timesteps: a line "
        "each, named where it ends; the lighter, the cleaner the latents.</p>"
        f"{panels_grid(panels, 'Not measured in this run.')}"
        f"{validation_videos(validations, shelf)}"
    )


def lines_by_timestep(validations: Sequence[dict], key: str) -> dict[float, Line]:
    """Steps and values of every timestep, ascending; steps that lack a measure are left out."""
    found: dict[float, Line] = {}
    for row in validations:
        for timestep, value in zip(row.get("timesteps") or (), row.get(key) or (), strict=False):
            if value is not None:
                steps, values = found.setdefault(timestep, ([], []))
                steps.append(row["step"])
                values.append(value)
    return dict(sorted(found.items()))


def _drift(validations: Sequence[dict]) -> Line | None:
    found = [(row["step"], (row.get("drift") or {}).get("relative")) for row in validations]
    known = [(step, value) for step, value in found if value is not None]
    return tuple(map(list, zip(*known, strict=True))) if known else None


def _curve(
    lines: Mapping[float | str, Line], key: str, texts: tuple[str, str], spans: Sequence[Phase]
) -> str | None:
    """`lines` by the name that each ends with."""
    if not lines:
        return None
    steps = [step for line in lines.values() for step in line[0]]
    extent = (
        min([*steps, *(span.start for span in spans)]),
        max([*steps, *(span.end for span in spans)]),
    )

    def draw(ax) -> None:
        shades = np.linspace(1, 0.3, len(lines))[::-1]
        for (steps, values), opacity in zip(lines.values(), shades, strict=True):
            ax.plot(steps, values, color=ACCENT, linewidth=1.6, alpha=opacity, **dots(len(steps)))
        if key != "cosine":
            ax.set_ylim(bottom=0)
        _name_ends(ax, lines, extent)

    # Room for the names on the right.
    return figure(*texts, draw, (extent[0], extent[0] + 1.13 * (extent[1] - extent[0])), spans)


def _name_ends(ax, lines, extent: tuple[float, float]) -> None:
    """Timesteps beside the ends of their lines, as many as find room."""
    low, high = ax.get_ylim()
    taken: list[float] = []
    across = extent[1] + 0.025 * (extent[1] - extent[0])
    for timestep, (_, values) in reversed(lines.items()):
        place = (values[-1] - low) / (high - low)
        if np.isfinite(place) and all(abs(place - other) > NAME_HEIGHT for other in taken):
            taken.append(place)
            ax.text(across, values[-1], str(timestep), color=ACCENT, va="center", clip_on=False)
