"""The report's sections: each turns one input into HTML, or says plainly what was not measured."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import av

from qvgen_jax.data.video import open_video
from qvgen_jax.evaluation.curves import column, training_panels
from qvgen_jax.evaluation.judge import STRICT_IOU

SHOWN_PAIRS = 24
SHOWN_ALARMS = 20
TINY_WIDTH = 200  # pixels; narrower videos are enlarged without smoothing
SIDES = {"teacher": "Teacher", "student": "Student"}
AGAINST = "Strict, against full precision"
JUDGED = {"shape": "Shape", "colour": "Colour", "direction": "Direction"}


def missing(what: str) -> str:
    """`what` is HTML."""
    return f'<p class="missing">{what}</p>'


def whole(value: float) -> str:
    """12345 -> 12 345, with a thin space that does not break."""
    return f"{value:,.0f}".replace(",", "\u202f")


def megabytes(size: float) -> str:
    """Bytes in units of 10^6."""
    mb = size / 1e6
    return f"{whole(mb) if mb >= 1000 else f'{mb:.1f}' if mb >= 10 else f'{mb:.2f}'} MB"


def percent_range(interval: Sequence[float]) -> str:
    return f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f} %"


def points(fraction: float) -> str:
    """A signed difference of shares in percentage points, with a true minus sign."""
    return f"{100 * fraction:+.1f}".replace("-", "−").replace("+0.0", "0.0").replace("−0.0", "0.0")


def find_variant(evaluation: dict | None, start: str) -> dict | None:
    variants = (evaluation or {}).get("variants", [])
    return next((v for v in variants if v["name"].startswith(start)), None)


# Videos


def videos_section(samples: list[dict] | None, folder: Path) -> str:
    if not samples:
        return missing("No samples were generated (<code>samples/samples.json</code> is missing).")
    shown = samples[:SHOWN_PAIRS]
    more = "" if len(shown) == len(samples) else f" The first {len(shown)} of {len(samples)}."
    widths = [_video_size(folder / pair[side])[0] for pair in shown for side in SIDES]
    size = "" if max(widths) <= TINY_WIDTH else " large"
    return (
        '<div class="above"><p>Left of each pair the full-precision teacher, right the quantized '
        f"student: same prompt, same seed, hence the same starting noise.{more}</p>"
        '<button id="motion" type="button" hidden>Pause videos</button></div>'
        f'<div class="pairs{size}">{"".join(_pair(pair, folder) for pair in shown)}</div>'
    )


def _pair(pair: dict, folder: Path) -> str:
    prompt = escape(pair["prompt"])
    frames = "".join(
        f"<div>{_video(folder / pair[side], f'{label}: {prompt}')}<span>{label}</span></div>"
        for side, label in SIDES.items()
    )
    caption = f"{prompt} <span>seed {escape(str(pair['seed']))}</span>"
    return (
        f'<figure class="pair"><div class="frames">{frames}</div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _video(path: Path, label: str) -> str:
    """`label` is HTML."""
    width, height = _video_size(path)
    if not width:
        return f'<div class="missing">{escape(path.name)} is missing or cannot be read.</div>'
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    tiny = ' class="tiny"' if width <= TINY_WIDTH else ""
    return (
        f'<video{tiny} width="{width}" height="{height}" autoplay loop muted playsinline '
        f'aria-label="{label}" src="data:video/mp4;base64,{data}"></video>'
    )


def _video_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels; zeros when there is no readable video."""
    try:
        with open_video(path) as container:
            codec = container.streams.video[0].codec_context
            return (codec.width, codec.height) if codec else (0, 0)
    except (OSError, IndexError, av.error.FFmpegError):
        return 0, 0


# The judge


def judge_section(evaluation: dict | None) -> str:
    if not evaluation or not evaluation.get("variants"):
        return missing("No videos were judged (<code>evaluation.json</code> is missing).")
    if not any(variant.get("strict") for variant in evaluation["variants"]):
        return missing("No videos were judged: the judge knows the tiny pipeline’s prompts only.")
    settings = (
        f"{evaluation['videos']} videos per row, {evaluation['steps']} sampling steps, guidance "
        f"{evaluation['guidance_scale']:g}. Prompts {evaluation['prompts']}."
    )
    if "seed" in evaluation:
        settings += f" Seeds count up from {evaluation['seed']}."
    rows = "".join(_judge_row(variant) for variant in evaluation["variants"])
    heads = [
        "Strict",
        "Plain",
        *JUDGED.values(),
        AGAINST,
        "Latents differ",
    ]
    axis = _scale_axis()
    return (
        "<p>An automatic judge reads every video. <em>Plain</em>: shape, colour and direction are "
        "all as the prompt says. <em>Strict</em>: the outline also matches the true shape’s "
        f"template (intersection over union above {STRICT_IOU:g}).</p>"
        f"<p>{escape(settings)} Intervals are 95 %. On the scale from 0 to 100 %, "
        f"{_key('strict')} is strict and {_key('plain')} is plain.</p>"
        '<table class="judge"><thead><tr><th scope="col">Model</th>'
        f'<th scope="col" class="dots" aria-label="Share of videos judged right">{axis}</th>'
        + "".join(f'<th scope="col">{head}</th>' for head in heads)
        + f"</tr></thead><tbody>{rows}</tbody></table>"
        '<p class="note" style="margin-top:1rem">The difference is paired, video by video with the '
        "same prompt and seed, in percentage points. Latents differ: norm of the difference "
        "of the final latents to full precision’s, relative to the norm of those.</p>"
    )


def _judge_row(variant: dict) -> str:
    cells = [_share_cell(key.title(), key, variant) for key in ("strict", "plain")]
    cells += [_share_cell(label, key, variant) for key, label in JUDGED.items()]
    cells += [_difference_cell(variant)]
    cells += [_cell("Latents differ", _number(variant.get("latent_difference")))]
    return (
        f'<tr><th scope="row">{escape(variant["name"])}</th>'
        f'<td class="dots">{_dots(variant)}</td>{"".join(cells)}</tr>'
    )


def _cell(label: str, value: str, detail: str = "") -> str:
    small = f"<small>{detail}</small>" if detail else ""
    return f'<td data-label="{label}"><span>{value}{small}</span></td>'


def _share_cell(label: str, key: str, variant: dict) -> str:
    """Counts; with their interval for the two verdicts, not for the attributes they are made of."""
    share = variant.get(key)
    if not share:
        return _cell(label, "–")
    detail = percent_range(share["interval"]) if key not in JUDGED else ""
    return _cell(label, f"{share['count']}/{share['total']}", detail)


def _difference_cell(variant: dict) -> str:
    difference, label = variant.get("strict_difference"), AGAINST
    if not difference:
        return _cell(label, "reference" if variant["name"] == "Full precision" else "–")
    low, high = difference["interval"]
    return _cell(label, points(difference["mean"]), f"{points(low)} to {points(high)}")


def _number(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


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


# Training


def training_section(records: Sequence[dict], alarms: Sequence[dict]) -> str:
    _, speeds = column(records, "steps_per_second")
    speed = f" Median speed {sorted(speeds)[len(speeds) // 2]:.2g} steps/s." if len(speeds) else ""
    marks = (
        " Vertical lines mark the phases of rank decay; the number above each is its rank."
        if len(set(column(records, "rank")[1])) > 1
        else ""
    )
    figures = "".join(
        f"<figure><h3>{escape(panel.title)}</h3>"
        + (panel.svg or missing("Not logged in this run."))
        + f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        for panel in training_panels(records)
    )
    last = whole(max(record["step"] for record in records))
    told = _alarms(records, alarms)
    return (
        f'<p>Logged up to step {last}.{speed}{marks}</p>{told}<div class="curves">{figures}</div>'
    )


def _alarms(records: Sequence[dict], alarms: Sequence[dict]) -> str:
    """What the run warned of, and how many updates it left out."""
    items = [f"Step {whole(each['step'])}: {each['alarm']}." for each in alarms]
    _, skipped = column(records, "skipped")
    if len(skipped) and skipped[-1]:
        items.append(f"{whole(skipped[-1])} updates were not finite, and left out.")
    listed = "".join(f"<li>{escape(item)}</li>" for item in items[:SHOWN_ALARMS])
    more = len(items) - SHOWN_ALARMS
    if more > 0:
        listed += f"<li>{more} more in <code>alarms.jsonl</code>.</li>"
    return f'<ul class="note alarms">{listed}</ul>' if items else ""


# Size and time


def size_section(sizes: dict | None) -> str:
    """`rows`, when present, add to the two sums: {"name", "bf16_bytes", "export_bytes"} each."""
    if not sizes:
        return missing("No export was measured (<code>sizes.json</code> is missing).")
    rows = [
        ("Whole transformer", sizes["transformer_bf16_bytes"], sizes["transformer_export_bytes"]),
        ("Its quantized linears", sizes["linears_bf16_bytes"], sizes["linears_export_bytes"]),
        *((r["name"], r["bf16_bytes"], r["export_bytes"]) for r in sizes.get("rows", [])),
    ]
    bars = "".join(_size_bars(*row) for row in rows)
    return f'<dl class="bars">{bars}</dl><p class="note">1 MB is 10<sup>6</sup> bytes.</p>'


def _size_bars(name: str, before: float, after: float) -> str:
    share = after / before if before else 0
    return (
        f"<dt>{escape(name)}: {share:.2f} of its bf16 bytes</dt>"
        f'<dd><i style="width:100%"></i><b>{megabytes(before)} <small>bf16</small></b></dd>'
        f'<dd><i class="small" style="width:{min(100 * share, 100):.1f}%"></i>'
        f"<b>{megabytes(after)} <small>export</small></b></dd>"
    )


def time_section(evaluation: dict | None) -> str:
    """`timing`, when the evaluation has it, is a sentence on what the seconds cover."""
    variants = (evaluation or {}).get("variants", [])
    timed = [v for v in variants if v.get("seconds_per_video") is not None]
    if not timed:
        return missing("Generation was not timed.")
    device = evaluation.get("device", "a device that was not recorded")
    rows = "".join(
        f'<tr><th scope="row">{escape(v["name"])}</th><td>{v["seconds_per_video"]:.2f} s</td></tr>'
        for v in timed
    )
    claim = (
        " On a CPU this is not the speed claim: low-bit kernels are for accelerators."
        if "cpu" in device.lower()
        else ""
    )
    timing = f" {escape(evaluation['timing'])}" if evaluation.get("timing") else ""
    return (
        f'<table class="narrow"><tbody>{rows}</tbody></table>'
        f'<p class="note" style="margin-top:1rem">Measured on {escape(device)}.{claim}{timing}</p>'
    )
