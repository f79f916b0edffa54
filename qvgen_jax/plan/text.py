"""A plan as text, and as JSON."""

from collections.abc import Sequence
from typing import Any

from qvgen_jax.plan import ahead
from qvgen_jax.plan.collectives import BETWEEN_SLICES, Collective
from qvgen_jax.plan.pace import SHARE_OF_LINKS, UTILISATION, link
from qvgen_jax.plan.plan import SPARE, Plan
from qvgen_jax.plan.target import Target
from qvgen_jax.quant.blocks import bits_label

_PASSES = {
    "teacher": "teacher forward",
    "forward": "student forward",
    "again": "student forward again",
    "backward": "student backward",
}
_HELD = {
    "master": "weights, float32",
    "moments": "moments of the optimizer",
    "average": "average of the weights",
    "teacher": "teacher",
    "batch": "batch",
    "gradients": "gradients, float32",
    "activations": "activations kept",
    "temporaries": "one block at work",
}


def as_text(plan: Plan, verdict: str) -> str:
    """The whole report."""
    parts = (_head(plan), _memory(plan), _operations(plan), _moved(plan), _backends(plan))
    return "\n\n".join([*parts, _time(plan), f"Verdict: {verdict}"])


def _head(plan: Plan) -> str:
    config, target, run = plan.run.config, plan.target, plan.run
    train, quant = config["train"], config["quant"]
    bits = bits_label(quant["weight_bits"], quant["act_bits"], quant["bits"])
    sizes = ", ".join(f"{axis} {size}" for axis, size in plan.sizes.items())
    memory = f", {target.memory / 1e9:.0f} GB a device" if target.memory else ""
    accumulated = f" in {train['accumulate']} parts" if train["accumulate"] > 1 else ""
    return "\n".join(
        [
            f"{config['model']}, {bits}, rank {quant['rank']}, on {target.name}: "
            f"{target.chips} x {target.chip.name}{memory}",
            f"mesh: {sizes}{_how_tokens_go(plan)}{_between_slices(plan)}",
            f"parameters: {_billions(plan.parameters[0])}, of them "
            f"{_billions(plan.parameters[1])} in quantized kernels",
            f"step: {train['batch_size']} samples{accumulated} of {run.tokens} tokens of video and "
            f"{run.text_tokens} of text; {train['steps']} steps; remat {train['remat']}",
        ]
    )


def _how_tokens_go(plan: Plan) -> str:
    if plan.sizes["context"] == 1:
        return ""
    ways = {"heads": "tokens exchanged for heads", "keys": "keys and values gathered"}
    return f" (self-attention: {ways[plan.exchange]})"


def _between_slices(plan: Plan) -> str:
    if plan.target.slices == 1:
        return ""
    across = plan.run.config["mesh"]["across_slices"]
    told = ", ".join(f"{axis} {size}" for axis, size in across.items() if size > 1)
    return f"; over the network between {plan.target.slices} slices: {told}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:9.3f}"


def _memory(plan: Plan) -> str:
    lines = ["memory of a device, GB"]
    for field, name in _HELD.items():
        if size := getattr(plan.memory, field):
            lines.append(f"  {name:28s} {_gigabytes(size)}")
    lines.append(f"  {'estimated at once':28s} {_gigabytes(plan.memory.peak)}")
    if plan.memory.host:
        lines.append(f"  {'kept on the host':28s} {_gigabytes(plan.memory.host)}")
    found = plan.compiled
    if isinstance(found, ahead.Compiled):
        for name, size in (
            ("compiler: arguments", found.arguments),
            ("compiler: temporaries", found.temporaries),
            ("compiler: all laid out", found.laid_out),
            ("compiler: alive at once", found.peak),
        ):
            lines.append(f"  {name:28s} {_gigabytes(size)}")
        lines.append(f"  (compiled in {found.seconds:.0f} s)")
    elif isinstance(found, ahead.Refused):
        lines.append(f"  the compiler refused: {found.reason}")
    else:
        lines.append("  (estimated; no compiler was asked)")
    return "\n".join(lines)


def _operations(plan: Plan) -> str:
    samples, total = plan.run.config["train"]["batch_size"], sum(plan.work.values())
    lines = [f"operations of a step: {plan.operations:.3e} (a multiply-add is two)"]
    for part, name in _PASSES.items():
        kinds = {kind: n for (where, kind), n in plan.work.items() if where == part}
        if not kinds:
            continue
        split = ", ".join(f"{kind} {100 * n / total:.1f} %" for kind, n in kinds.items())
        share = sum(kinds.values())
        lines.append(
            f"  {name:22s} {2 * samples * share:.3e} {100 * share / total:5.1f} %: {split}"
        )
    return "\n".join(lines)


def _moved(plan: Plan) -> str:
    if plan.target.devices == 1:
        return "collectives: none, there is one device"
    source = "compiled" if isinstance(plan.compiled, ahead.Compiled) else "estimated"
    lines = [f"collectives of a step, {source}; GB that arrive at each device"]
    for each in plan.moved:
        kind = "between slices" if each.kind == BETWEEN_SLICES else each.kind
        lines.append(
            f"  {kind:18s} {each.dtype:5s} over {each.devices:3d} x {each.count:6d} "
            f"{_gigabytes(each.bytes)}"
        )
    lines.append(f"  {'all of them':44s} {_gigabytes(sum(c.bytes for c in plan.moved))}")
    if codes := _codes(plan):
        lines.append(
            f"  of them {_gigabytes(codes).strip()} are weights in codes of a byte; as float32 "
            f"they would be {_gigabytes(4 * codes).strip()}"
        )
    return "\n".join(lines)


def _codes(plan: Plan) -> int:
    """Bytes of codes that arrive at a device. Where a TPU adds them, it packs four in a word."""
    if plan.run.config["train"]["teacher_weights"] == "int8":
        return 0  # Some are the teacher's, which would not be float32.
    return sum(c.bytes for c in plan.moved if c.dtype in ("s8", "u8", "u32"))


def _backends(plan: Plan) -> str:
    lines = ["backends"]
    for queries, keys, name, reason in plan.attention:
        lines.append(f"  attention of {queries} tokens to {keys}: {name} ({reason})")
    lines.append(
        f"  linears in training: XLA's products of codes in {_dtype(plan)}, gradients in "
        f"{plan.run.config['compute_dtype']}"
    )
    kernels: dict[tuple[str, str], int] = {}
    for row in plan.layers:
        key = (row.choice.backend, row.choice.reason)
        kernels[key] = kernels.get(key, 0) + row.count
    for (backend, reason), count in kernels.items():
        lines.append(f"  linears of the export: {count} by {backend} ({reason})")
    return "\n".join(lines)


def _dtype(plan: Plan) -> str:
    return plan.run.config["quant"]["product_dtype"]


def _time(plan: Plan) -> str:
    if plan.pace is None:
        return f"time: unknown, {plan.target.chip.name} has no peak in a data sheet"
    pace, target = plan.pace, plan.target
    fast, slow = (s * plan.run.config["train"]["steps"] / 3600 for s in (pace.fast, pace.slow))
    low, high = (round(100 * share) for share in UTILISATION)
    few, most = (round(100 * share) for share in SHARE_OF_LINKS)
    lines = [
        "time, computed from data sheets, not measured",
        f"  step          {_range(pace.fast, pace.slow)} s: at best the larger of both, at worst "
        "their sum",
        f"    computing   {_range(*pace.computing)} s, {high} to {low} % of "
        f"{target.chip.bf16:.0f} TFLOP/s in bfloat16 a chip",
        *(
            [
                f"    moving      {_range(*pace.moving)} s, {most} to {few} % of "
                f"{link(target) / 1e9:.0f} GB/s a device{_network(target)}"
            ]
            if plan.moved
            else []
        ),
        f"  run           {_range(fast, slow)} h",
        f"  chip-hours    {_range(fast * target.chips, slow * target.chips)}: {_split(plan)}",
    ]
    return "\n".join(lines)


def _network(target: Target) -> str:
    if target.slices == 1:
        return ""
    return f", {link(target, BETWEEN_SLICES) / 1e9:.3g} between slices"


def _range(low: float, high: float) -> str:
    return f"{_three(low)} to {_three(high)}"


def _three(number: float) -> str:
    """Three digits, or all of those before the point."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def _split(plan: Plan) -> str:
    total = sum(plan.work.values())
    shares = []
    for part, name in _PASSES.items():
        share = sum(n for (where, _), n in plan.work.items() if where == part)
        if share:
            shares.append(f"{name} {100 * share / total:.0f} %")
    return ", ".join(shares)


def as_json(plan: Plan, verdict: str) -> dict[str, Any]:
    """The same, for programs: bytes, operations and seconds."""
    compiled = plan.compiled
    found = compiled._asdict() if compiled is not None else None
    if isinstance(compiled, ahead.Compiled):
        found |= {"collectives": _plain(compiled.collectives)}
    return {
        "model": plan.run.config["model"],
        "target": plan.target.name,
        "devices": plan.target.devices,
        "slices": plan.target.slices,
        "mesh": plan.sizes,
        "remat": plan.run.config["train"]["remat"],
        "parameters": plan.parameters[0],
        "quantized_parameters": plan.parameters[1],
        "memory": {
            **plan.memory._asdict(),
            "arguments": plan.memory.arguments,
            "peak": plan.memory.peak,
        },
        "compiled": found,
        "device_memory": plan.target.memory,
        "spare": SPARE,
        "operations": plan.operations,
        "work": {
            f"{part}: {kind}": 2 * n * plan.run.config["train"]["batch_size"]
            for (part, kind), n in plan.work.items()
        },
        "collectives": _plain(plan.moved),
        "attention": [
            dict(zip(("queries", "keys", "backend", "reason"), each, strict=True))
            for each in plan.attention
        ],
        "step_seconds": [plan.pace.fast, plan.pace.slow] if plan.pace else None,
        "fits": plan.fits,
        "verdict": verdict,
    }


def _plain(moved: Sequence[Collective]) -> list[dict]:
    return [each._asdict() for each in moved]
