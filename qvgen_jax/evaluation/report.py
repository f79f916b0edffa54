"""The report of a run: one HTML file with its videos, numbers and curves inside, no network needed.

It reads what training, generation, evaluation and export left in the workdir: `metrics.jsonl`
(required), `alarms.jsonl`, `config.json`, `samples/samples.json` with its mp4 files,
`evaluation.json` and `sizes.json`. A section whose input is missing says so; nothing is ever filled
in.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import report_sections as sections
from qvgen_jax.evaluation.curves import column
from qvgen_jax.evaluation.report_inputs import (
    CONFIG,
    SAMPLES,
    SIZES,
    read_evaluation,
    read_input,
)
from qvgen_jax.evaluation.report_sections import find_variant, percent_range, points, whole
from qvgen_jax.json_file import parse_json

FEW_VIDEOS = 100  # below this the intervals are too wide for a claim about quality


def write_report(workdir: Path) -> Path:
    """Write `workdir/report/index.html` and return its path.

    Beside the run's own keys, `config.json` may hold `name` (else the workdir's) and `command`.
    Raises UserError when the workdir holds no metrics, or a file in it is not what was written.
    """
    workdir = Path(workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    config = read_input(workdir / "config.json", CONFIG) or {}
    evaluation = read_evaluation(workdir / "evaluation.json")
    sizes = read_input(workdir / "sizes.json", SIZES)
    samples = read_input(workdir / "samples" / "samples.json", SAMPLES)
    name = str(config.get("name") or workdir.resolve().name)

    body = [_head(name, config, records, evaluation, sizes)]
    for title, content in {
        "Videos": sections.videos_section(samples, workdir / "samples"),
        "What the judge found": sections.judge_section(evaluation),
        "Training": sections.training_section(records, read_alarms(workdir / "alarms.jsonl")),
    }.items():
        body.append(f"<section><h2>{title}</h2>{content}</section>")
    body.append(
        '<section class="columns">'
        f"<div><h2>Size</h2>{sections.size_section(sizes)}</div>"
        f"<div><h2>Seconds per video</h2>{sections.time_section(evaluation)}</div></section>"
        f"<section><h2>Do it again</h2>{_reproduce(config, evaluation)}</section>"
    )
    template = Template(files("qvgen_jax.evaluation").joinpath("report.html").read_text("utf-8"))
    page = template.substitute(title=f"{escape(name)}: QVGen report", body="\n".join(body))
    path = workdir / "report" / "index.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8", errors="replace")
    return path


def read_metrics(path: Path) -> list[dict]:
    """The logged steps in order. A step logged twice (a resumed run) counts once, as last logged;
    a line cut short by a kill is skipped. Raises UserError when nothing is left.
    """
    by_step = {record["step"]: record for record in _records(path)}
    if not by_step:
        raise UserError(
            f"{path} holds no logged step, and a report needs at least one. "
            f"Train first: python main.py --config <config> --workdir {path.parent}"
        )
    return [by_step[step] for step in sorted(by_step)]


def read_alarms(path: Path) -> list[dict]:
    """What training warned of: `step` and `alarm` each; none where there is no file."""
    return [record for record in _records(path) if "alarm" in record]


def _records(path: Path) -> Iterator[dict]:
    """Lines with a step; one that is none, cut short by a kill, is skipped."""
    for line in path.read_text("utf-8", "replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield record


def _head(name: str, config: dict, records: Sequence[dict], evaluation, sizes) -> str:
    bits = bits_label(config)
    bits = f" <span>{escape(bits)}</span>" if bits else ""
    return (
        f'<p class="eyebrow">qvgen-jax, report of a run</p><h1>{escape(name)}{bits}</h1>'
        f'<p class="lead">{escape(_finding(evaluation))}</p>{_caution(evaluation)}'
        f"{_facts(records, evaluation, sizes)}"
    )


def bits_label(config: dict) -> str:
    """W4A4 and the like; empty when the config does not say."""
    quant = config.get("quant") or {}
    weight, activation = quant.get("weight_bits"), quant.get("act_bits")
    return f"W{weight}A{activation}" if weight and activation else ""


def _finding(evaluation: dict | None) -> str:
    student, teacher = find_variant(evaluation, "QVGen"), find_variant(evaluation, "Full precision")
    if not all((variant or {}).get("strict") for variant in (student, teacher)):
        return (
            "The trained student was not compared with full precision by the judge in this run: "
            "what follows shows the training, and whatever else was measured."
        )
    right, total = student["strict"]["count"], student["strict"]["total"]
    prompts = evaluation["prompts"].partition(":")[0]  # "held out: what that means"
    return (
        f"Of {total} videos (prompts {prompts}), the judge found shape, colour, "
        f"direction and outline all right in {right} by {student['name']} and in "
        f"{teacher['strict']['count']} by the full-precision teacher."
    )


def _caution(evaluation: dict | None) -> str:
    student = find_variant(evaluation, "QVGen")
    if not (student or {}).get("strict"):
        return ""
    interval = percent_range(student["strict"]["interval"])
    if evaluation["videos"] < FEW_VIDEOS:
        text = (
            f"With {evaluation['videos']} videos this is a demo-sized check. The intervals are "
            f"wide (the student’s true share may lie anywhere in {interval}): it shows that the "
            "whole path works, not how good the model is."
        )
    else:
        text = f"The 95 % interval of the student’s share is {interval}."
    return f'<p class="note">{escape(text)}</p>'


def _facts(records: Sequence[dict], evaluation: dict | None, sizes: dict | None) -> str:
    facts = []
    difference = (find_variant(evaluation, "QVGen") or {}).get("strict_difference")
    if difference:
        low, high = map(points, difference["interval"])
        facts.append(
            (
                "Student minus teacher, strict",
                points(difference["mean"]),
                f"points ({low} to {high})",
            )
        )
    if sizes:
        before, after = sizes["transformer_bf16_bytes"], sizes["transformer_export_bytes"]
        detail = f"{after / before:.2f} of {sections.megabytes(before)} in bf16"
        facts.append(("Transformer on disk", sections.megabytes(after), detail))
    last = records[-1]
    _, ranks = column(records, "rank")
    detail = " to ".join(dict.fromkeys(f"{rank:g}" for rank in (*ranks[:1], *ranks[-1:])))
    detail = f"rank {detail}" if detail else ""
    facts.append(("Last step logged", whole(last["step"]), detail))
    _, losses = column(records, "loss")
    losses = losses[-max(1, len(losses) // 20) :]
    if len(losses) and math.isfinite(losses.mean()):
        steps = f"mean of the last {len(losses)} logged steps" if len(losses) > 1 else "last step"
        facts.append(("Loss at the end", f"{losses.mean():.3g}", steps))
    items = "".join(
        f"<div><dt>{label}</dt><dd>{escape(value)}<small>{escape(detail)}</small></dd></div>"
        for label, value, detail in facts
    )
    return f'<dl class="facts">{items}</dl>'


def _reproduce(config: dict, evaluation: dict | None) -> str:
    seed = config.get("seed")
    seed = (
        sections.missing("The seed was not recorded.")
        if seed is None
        else f"<p>Everything random in training follows from seed {escape(str(seed))}.</p>"
    )
    versions = (evaluation or {}).get("versions") or {}
    told = " · ".join(f"{escape(k)} <b>{escape(str(v))}</b>" for k, v in versions.items())
    return (
        (
            f"<pre>{escape(config['command'])}</pre>"
            if config.get("command")
            else sections.missing("The command was not recorded.")
        )
        + seed
        + (
            f'<p class="versions">{told}</p>'
            if told
            else sections.missing("Versions: not recorded.")
        )
        + (
            "<details><summary>The whole configuration, with overrides</summary>"
            f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"
            if config
            else sections.missing("<code>config.json</code> is missing: no configuration to show.")
        )
    )
