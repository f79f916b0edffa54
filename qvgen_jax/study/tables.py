"""The tables of a study in Markdown, written from its records alone."""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvgen_jax.evaluation.intervals import Interval
from qvgen_jax.study import compare
from qvgen_jax.study.record import read_stage

FILE = "tables.md"


def write_tables(study: Path, docs: Path, recipe: str = "") -> None:
    """Write `docs/tables.md` of all stages of the study.

    Args:
        study: the folder of the records.
        docs: where to.
        recipe: a variant that the judged ones are compared with, beside the default; "" for none.
    """
    parts = ["<!-- Written by `python main.py --job study`; edits are lost. -->\n# Tables"]
    folders = sorted(path for path in study.iterdir() if path.is_dir())
    for folder in reversed(folders):  # Screening before finals.
        records = read_stage(study, folder.name)
        failures = sorted(folder.glob("*.failed.json"))
        if records or failures:
            parts += stage_section(folder.name, records, recipe)
            parts += _failures(failures)
    docs.mkdir(parents=True, exist_ok=True)
    (docs / FILE).write_text("\n\n".join(parts) + "\n")


def stage_section(stage: str, records: Sequence[Mapping], recipe: str = "") -> list[str]:
    """Headings, tables and what they mean, of one stage; `recipe` see `write_tables`."""
    parts = [f"## {stage.capitalize()}"]
    judged = any(record["judge"] for record in records)
    parts += _code_notes(records)
    for bits in compare.bits_of(records):
        some = [record for record in records if tuple(record["bits"]) == bits]
        parts.append(f"### {stage.capitalize()}, W{bits[0]}A{bits[1]}")
        if judged:
            parts += [_final_table(some, bits, recipe), _final_notes(some)]
        parts += [_screening_table(some, bits), _screening_notes(some, bits, records)]
    return parts


def _code_notes(records: Sequence[Mapping]) -> list[str]:
    """A warning where the cells of a stage were not all computed by the same, committed code."""
    counts = Counter((record["code"]["commit"], record["code"]["dirty"]) for record in records)
    if len(counts) < 2 and not any(dirty for _, dirty in counts):
        return []
    several = [
        f"{(commit or 'unknown')[:8]}{' with uncommitted changes' if dirty else ''} ({count})"
        for (commit, dirty), count in counts.most_common()
    ]
    return [f"Code of these {len(records)} cells, by commit: {', '.join(several)}."]


def _screening_table(records: Sequence[Mapping], bits: Sequence[int]) -> str:
    lines = [
        "| variant | seeds | held-out loss | to default | drift | to default | motion | steps "
        "| s/step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in compare.screening_rows(records, bits):
        cells = [
            row["variant"],
            str(row["seeds"]),
            _number(row["loss"], 4) if math.isfinite(row["loss"]) else "not finite",
            _change(row, "loss_change"),
            _number(row["drift"], 3),
            _change(row, "drift_change"),
            _number(row["motion"], 2),
            str(row["steps"]),
            _number(row["seconds_per_step"], 2),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _screening_notes(
    records: Sequence[Mapping], bits: Sequence[int], stage: Sequence[Mapping]
) -> str:
    """Of one bit-width's table; the luck of a seed is that of the whole stage."""
    first = records[0]
    clips = first["held_out"]["clips"] if first["held_out"] else 0
    timesteps = len(first["timesteps"] or ())
    videos = first["drift"]["videos"] if first["drift"] else 0
    text = (
        "Held-out loss: mean squared error of the exported student's prediction against full "
        f"precision's by the variance of the latter, mean over {timesteps} timesteps and {clips} "
        f"clips. Drift: relative difference of the final latents, mean over {videos} videos. "
        "Motion: change between latent frames, by full precision's. Means over a row's training "
        "seeds, changes paired seed by seed. Intervals (95 %) are over clips and videos: the luck "
        "of a training seed is not in them."
    )
    found = compare.luck(stage)
    if found is not None:
        others = len({record["variant"] for record in records}) - 1
        text += (
            " Two single runs that differ in their seed alone may be "
            f"{100 * found[0]:.1f} % apart in held-out loss (2.8 standard deviations of the "
            f"default's seeds, pooled over bit-widths, {_count(found[1], 'degree')} of freedom): "
            f"smaller changes may be luck, and of {_count(others, 'comparison')} one in 20 is "
            "expected beyond it by chance."
        )
    return text


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _final_table(records: Sequence[Mapping], bits: Sequence[int], recipe: str) -> str:
    references = [compare.DEFAULT, *([recipe] if recipe else [])]
    differences = "".join(f"| to {reference}, points " for reference in references)
    lines = [
        f"| variant | seeds | strict | to full precision, points {differences}"
        "| latents differ by | export, MB |",
        f"|---|---|---|---|{'---|' * len(references)}---|---|",
    ]
    teacher = compare.full_precision(records)
    nothing = " |" * len(references)
    lines.append(f"| full precision | | {_share(*teacher)} | reference |{nothing} 0 | |")
    for row in compare.final_rows(records, bits, references):
        mean, low, high = row["latents"]
        cells = [
            row["variant"],
            str(row["seeds"]),
            _share(row["strict"], row["count"], row["total"]),
            _points(row["to_full_precision"]),
            *(_points(row["to"][r]) if r in row["to"] else "reference" for r in references),
            f"{mean:.3f} ({low:.3f} to {high:.3f})",
            f"{row['export_bytes'] / 1e6:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _final_notes(records: Sequence[Mapping]) -> str:
    videos = compare.full_precision(records)[2]
    return (
        "Strict: shape, colour and direction are right and the outline matches; "
        f"{videos} videos per training seed, with the same prompts and noise for everybody; "
        "Wilson's 95 % interval over all of them, as if they were independent. Differences are "
        "paired, video by video; their "
        "intervals come from drawing training seeds and videos again, each by itself, every drawn "
        "seed with every drawn video. Latents: mean over seeds, least and greatest."
    )


def _failures(paths: Sequence[Path]) -> list[str]:
    if not paths:
        return []
    lines = ["Failed at the last start:\n"]
    for path in paths:
        last = json.loads(path.read_text())["log"][-1:] or ["no output"]
        lines.append(f"- {path.name.removesuffix('.failed.json')}: `{last[0].strip()}`")
    return ["\n".join(lines)]


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _change(row: Mapping, key: str) -> str:
    if row["variant"] == compare.DEFAULT:
        return "reference"
    found: Interval | None = row[key]
    if found is None:
        return "–"
    value, low, high = (100 * part for part in found)
    return f"{value:+.1f} % ({low:+.1f} to {high:+.1f})"


def _points(found: Interval | None) -> str:
    if found is None:
        return "–"
    value, low, high = (100 * part for part in found)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _share(found: Interval, count: int, total: int) -> str:
    value, low, high = (100 * part for part in found)
    return f"{value:.1f} % ({count}/{total}, {low:.1f} to {high:.1f})"
