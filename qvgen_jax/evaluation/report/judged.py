"""What the judge found in every variant's videos, and how near they are to full precision's."""

from collections.abc import Sequence
from html import escape

from qvgen_jax.evaluation.judge import STRICT_IOU
from qvgen_jax.evaluation.report.table import CARDS, Cell, Head, table
from qvgen_jax.evaluation.report.words import missing, number, percent_range, points, signed

JUDGED = {"shape": "Shape", "colour": "Colour", "direction": "Direction"}
MEASURES = {
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 3),
    "consistency": ("Consistency", 4),
    "consistency_difference": ("Consistency, against full precision", 4),
    "motion": ("Motion, by full precision’s", 2),
}
"""Key -> the column's head, and how many digits are shown."""


def judge_section(evaluation: dict | None) -> str:
    """The judge's verdicts, where it knows the prompts, and the measures that need no judge."""
    variants = (evaluation or {}).get("variants")
    if not variants:
        return missing("No videos were judged (<code>evaluation.json</code> is missing).")
    settings = (
        f"{evaluation['videos']} videos per row, {evaluation['steps']} sampling steps, guidance "
        f"{evaluation['guidance_scale']:g}. Prompts {evaluation['prompts']}."
    )
    if "seed" in evaluation:
        settings += f" Seeds count up from {evaluation['seed']}."
    return (
        f"<p>{escape(settings)} Intervals are 95 %.</p>{_verdicts(variants)}{_measures(variants)}"
    )


def _verdicts(variants: Sequence[dict]) -> str:
    if not any(variant.get("strict") for variant in variants):
        return missing("No judge knows these prompts: shape, colour and direction were not judged.")
    heads = [
        Head("Model"),
        Head("Share of videos judged right", _scale_axis()),
        *map(Head, ("Strict", "Plain", *JUDGED.values())),
        Head("Strict, against full precision"),
        Head("Latents differ"),
    ]
    rows = [(variant["name"], _verdict_cells(variant)) for variant in variants]
    return (
        "<p>An automatic judge reads every video. <em>Plain</em>: shape, colour and direction are "
        "all as the prompt says. <em>Strict</em>: the outline also matches the true shape’s "
        f"template (intersection over union above {STRICT_IOU:g}). On the scale from 0 to "
        f"100\u00a0%, {_key('strict')} is strict and {_key('plain')} is plain.</p>"
        f"{table('What the judge found', heads, rows, CARDS)}"
        '<p class="note after">The difference is paired, video by video with the same prompt and '
        "seed, in percentage points. Latents differ: norm of the difference of the final latents "
        "to full precision’s, relative to the norm of those.</p>"
    )


def _verdict_cells(variant: dict) -> list[Cell]:
    latents = variant.get("latent_difference")
    return [
        Cell(_dots(variant)),
        *(_share_cell(key, variant) for key in ("strict", "plain", *JUDGED)),
        _difference_cell(variant),
        Cell(number(latents), value=latents),
    ]


def _share_cell(key: str, variant: dict) -> Cell:
    """Counts; with their interval for the two verdicts, not for the attributes they are made of."""
    share = variant.get(key)
    if not share:
        return Cell("–")
    detail = percent_range(share["interval"]) if key not in JUDGED else ""
    value = share["count"] / share["total"] if share["total"] else None
    return Cell(f"{share['count']}/{share['total']}", detail, value)


def _difference_cell(variant: dict) -> Cell:
    difference = variant.get("strict_difference")
    if not difference:
        return Cell("reference" if variant["name"] == "Full precision" else "–")
    low, high = difference["interval"]
    mean = difference["mean"]
    return Cell(points(mean), f"{points(low)} to {points(high)}", mean)


def _measures(variants: Sequence[dict]) -> str:
    title = "<h3>How near to full precision</h3>"
    shown = [
        key
        for key in MEASURES
        if any((variant.get("metrics") or {}).get(key) for variant in variants)
    ]
    if not shown:
        return title + missing("PSNR, SSIM, consistency and motion were not measured.")
    heads = [Head("Model"), *(Head(MEASURES[key][0]) for key in shown)]
    rows = [(v["name"], [_measure_cell(v.get("metrics"), key) for key in shown]) for v in variants]
    return (
        f"{title}<p>Every frame against full precision’s of the same prompt and seed (PSNR, SSIM); "
        "how alike successive frames of a video are (consistency, a mean cosine); how much moves "
        "(motion; 1 is as much).</p>"
        f"{table('How near to full precision', heads, rows, CARDS)}"
    )


def _measure_cell(metrics: dict | None, key: str) -> Cell:
    if metrics is None:
        return Cell("reference")
    estimate, digits = metrics.get(key), MEASURES[key][1]
    if not estimate:
        return Cell("–")
    text = signed if key == "consistency_difference" else number
    low, high = (text(bound, digits) for bound in estimate["interval"])
    return Cell(text(estimate["mean"], digits), f"{low} to {high}", estimate["mean"])


def _dots(variant: dict) -> str:
    """Dot and whisker of strict (above) and plain (below) on a scale from 0 to 100 %."""
    lines = "".join(
        f'<line class="grid" x1="{x}%" x2="{x}%" y1="0" y2="100%"/>' for x in (0, 25, 50, 75, 100)
    )
    said = []
    for key, y in (("strict", "33%"), ("plain", "70%")):
        share = variant.get(key)
        if not share or not share["total"]:
            continue
        low, high = (100 * bound for bound in share["interval"])
        mean = 100 * share["count"] / share["total"]
        lines += (
            f'<line class="{key}" x1="{low:.1f}%" x2="{high:.1f}%" y1="{y}" y2="{y}"/>'
            f'<circle class="{key}" cx="{mean:.1f}%" cy="{y}" r="4"/>'
        )
        said.append(f"{key} {mean:.0f} %, interval {percent_range(share['interval'])}")
    if not said:
        return "–"
    return f'<svg role="img" aria-label="{escape("; ".join(said))}">{lines}</svg>'


def _scale_axis() -> str:
    anchors = {0: "start", 50: "middle", 100: "end"}
    marks = "".join(
        f'<text x="{x}%" y="80%" text-anchor="{anchor}">{x}{" %" if x == 100 else ""}</text>'
        for x, anchor in anchors.items()
    )
    return f'<svg class="scale" aria-hidden="true">{marks}</svg>'


def _key(name: str) -> str:
    return (
        f'<svg class="key" aria-hidden="true"><line class="{name}" x1="0" x2="100%" y1="50%" '
        f'y2="50%"/><circle class="{name}" cx="50%" cy="50%" r="4"/></svg>'
    )
