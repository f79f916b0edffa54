"""What the model weighs, and what a video costs."""

from collections.abc import Callable
from html import escape

from qvgen_jax.evaluation.report.table import CARDS, Cell, Head, table
from qvgen_jax.evaluation.report.words import megabytes, missing, number


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
    share = share_of(before, after)
    return (
        f"<dt>{escape(name)}: {share:.2f} of its bf16 bytes</dt>"
        f'<dd><i style="width:100%"></i><b>{megabytes(before)} <small>bf16</small></b></dd>'
        f'<dd><i class="small" style="width:{min(100 * share, 100):.1f}%"></i>'
        f"<b>{megabytes(after)} <small>export</small></b></dd>"
    )


def share_of(before: float, after: float) -> float:
    """Of what was there; 0 where nothing was."""
    return after / before if before else 0.0


def time_section(evaluation: dict | None) -> str:
    """`timing`, when the evaluation has it, is a sentence on what the seconds cover."""
    variants = (evaluation or {}).get("variants", [])
    speeds = [(v["name"], _speed(v)) for v in variants]
    timed = [(name, speed) for name, speed in speeds if speed.get("seconds_per_video") is not None]
    if not timed:
        return missing("Generation was not timed.")
    device = evaluation.get("device", "a device that was not recorded")
    claim = (
        " On a CPU this is not the speed claim: low-bit kernels are for accelerators."
        if "cpu" in device.lower()
        else ""
    )
    timing = f" {escape(evaluation['timing'])}" if evaluation.get("timing") else ""
    columns = {key: head for key, head in _COLUMNS.items() if any(key in s for _, s in timed)}
    heads = [Head("Model"), *(Head(head) for head, *_ in columns.values())]
    rows = [
        (name, [_cell(speed.get(key), *how) for key, (_, *how) in columns.items()])
        for name, speed in timed
    ]
    return (
        f"{table('Seconds and memory', heads, rows, CARDS)}"
        f'<p class="note after">Measured on {escape(device)}.{claim}{timing}</p>'
    )


_COLUMNS = {
    "seconds_per_video": ("Seconds per video", lambda value: f"{value:.2f} s", "–"),
    "ratio_to_reference": ("By full precision’s", number, "not comparable"),
    "weights_bytes": ("Weights in memory", megabytes, "–"),
    "peak_bytes": ("Peak memory", megabytes, "not measured"),
}
"""Key -> the column's head, how its numbers are written, and what stands for one that is null."""


def _speed(variant: dict) -> dict:
    seconds = variant.get("seconds_per_video")
    return {"seconds_per_video": seconds} | (variant.get("speed") or {})


def _cell(value: float | None, text: Callable[[float], str], absent: str) -> Cell:
    return Cell(absent if value is None else text(value), value=value)
