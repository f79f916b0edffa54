"""How the report begins: what was found, and the numbers that matter."""

import math
from collections.abc import Sequence
from html import escape

from qvgen_jax.evaluation.report.curves import column
from qvgen_jax.evaluation.report.inputs import find_student, find_variant
from qvgen_jax.evaluation.report.sizes import share_of
from qvgen_jax.evaluation.report.words import megabytes, number, percent_range, points, whole
from qvgen_jax.quant.blocks import bits_label

FEW_VIDEOS = 100  # below this the intervals are too wide for a claim about quality


def overview(
    name: str,
    config: dict,
    records: Sequence[dict],
    evaluation: dict | None,
    sizes: dict | None,
) -> str:
    """The name of the run, a sentence on what was found, how far to trust it, and a few numbers."""
    bits = _bits(config)
    bits = f" <span>{escape(bits)}</span>" if bits else ""
    return (
        f'<p class="eyebrow">qvgen-jax, report of a run</p><h1>{escape(name)}{bits}</h1>'
        f'<p class="lead">{escape(_finding(evaluation))}</p>{_caution(evaluation)}'
        f"{_facts(records, evaluation, sizes)}"
    )


def _bits(config: dict) -> str:
    """W4A4 and the like; empty when the config does not say."""
    quant = config.get("quant") or {}
    weight, activation = quant.get("weight_bits"), quant.get("act_bits")
    return bits_label(weight, activation, quant.get("bits", ())) if weight and activation else ""


def _finding(evaluation: dict | None) -> str:
    student, teacher = find_student(evaluation), find_variant(evaluation, "Full precision")
    if not student or not teacher:
        return (
            "The trained student was not compared with full precision in this run: "
            "what follows shows the training, and whatever else was measured."
        )
    prompts = evaluation["prompts"].partition(":")[0]  # "held out: what that means"
    if student.get("strict") and teacher.get("strict"):
        right, total = student["strict"]["count"], student["strict"]["total"]
        return (
            f"Of {total} videos (prompts {prompts}), the judge found shape, colour, "
            f"direction and outline all right in {right} by {student['name']} and in "
            f"{teacher['strict']['count']} by the full-precision teacher."
        )
    begin = f"{student['name']} and full precision made {evaluation['videos']} videos each"
    begin += f" (prompts {prompts}), from the same noise"
    psnr = (student.get("metrics") or {}).get("psnr")
    if not psnr:
        return f"{begin}. No judge knows these prompts."
    low, high = (number(bound, 1) for bound in psnr["interval"])
    return f"{begin}: the frames match at {number(psnr['mean'], 1)} dB PSNR ({low} to {high})."


def _caution(evaluation: dict | None) -> str:
    student = find_student(evaluation)
    if not student:
        return ""
    few = evaluation["videos"] < FEW_VIDEOS
    interval = percent_range(student["strict"]["interval"]) if student.get("strict") else ""
    if few:
        where = f" (the student’s true share may lie anywhere in {interval})" if interval else ""
        text = (
            f"With {evaluation['videos']} videos this is a demo-sized check. The intervals are "
            f"wide{where}: it shows that the whole path works, not how good the model is."
        )
    elif interval:
        text = f"The 95 % interval of the student’s share is {interval}."
    else:
        return ""
    return f'<p class="note">{escape(text)}</p>'


def _facts(records: Sequence[dict], evaluation: dict | None, sizes: dict | None) -> str:
    facts = []
    student = find_student(evaluation) or {}
    difference = student.get("strict_difference")
    if difference:
        low, high = map(points, difference["interval"])
        facts.append(
            (
                "Strict, minus teacher’s",
                points(difference["mean"]),
                f"points ({low} to {high})",
            )
        )
    if sizes:
        before, after = sizes["transformer_bf16_bytes"], sizes["transformer_export_bytes"]
        detail = f"{share_of(before, after):.2f} of {megabytes(before)} in bf16"
        facts.append(("Transformer on disk", megabytes(after), detail))
    if (ratio := (student.get("speed") or {}).get("ratio_to_reference")) is not None:
        facts.append(("Seconds per video", number(ratio), "by full precision’s"))
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
