"""`--job mixed`: a scan and a budget to the bits of every layer, in a file that configs accept."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qvgen_jax.errors import UserError
from qvgen_jax.mixed.candidates import Candidate
from qvgen_jax.mixed.costs import Budget, layer_costs, parse_budget, total
from qvgen_jax.mixed.inputs import Probed, asked_by, check_probe, left_out, read_probed
from qvgen_jax.mixed.scan import at, layer_targets
from qvgen_jax.mixed.sensitivity import NAME, Sensitivity, read_sensitivity
from qvgen_jax.mixed.solve import Solution, solve
from qvgen_jax.models import quantizable
from qvgen_jax.models.linears import linears
from qvgen_jax.plan.shapes import read_run
from qvgen_jax.plan.target import parse_target
from qvgen_jax.quant.bits_file import write_bits
from qvgen_jax.quant.blocks import segments_of
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.switched import switched_params
from qvgen_jax.training.check import check_config
from qvgen_jax.training.lock import alone_in
from qvgen_jax.training.student import describe_layers, quant_config

BITS = "bits.json"


class Row(NamedTuple):
    """One way to give bits to all layers: its damages are squares of relative errors."""

    name: str
    quant: QuantConfig
    cost: float
    predicted: float
    measured: float | None = None


def run_mixed(
    config: Mapping,
    workdir: Path,
    budget: str,
    segments: int,
    target: str = "",
    measure: bool = True,
) -> str:
    """Plans, writes `bits.json`, and compares with equal bits everywhere; the report as text.

    Args:
        config: of a training run, plain dicts; its bits are not read.
        workdir: of the scan.
        budget: see `parse_budget`.
        segments: that the blocks may form, see `qvgen_jax.quant.blocks`.
        target: the chip of a budget in ms, see `qvgen_jax.plan.target`.
        measure: whether to ask the model for the damages that the plan adds up.

    Raises:
        UserError: no complete scan, one of another model or other clips, or too small a budget.
    """
    check_config(config)
    asked = parse_budget(budget)
    if measure:
        check_probe(config, workdir, "mixed")
    with alone_in(workdir):
        return _plan(config, workdir, asked, segments, target, measure)


def _plan(
    config: Mapping, workdir: Path, asked: Budget, segments: int, target: str, measure: bool
) -> str:
    found, run = read_sensitivity(workdir / NAME), read_run(config)
    quant = quant_config({**config["quant"], "bits": ()}, run.model)
    options = _options(found)
    names = quant.quantized(quantizable(run.model))
    if tuple(layer_targets(names, run.model.num_layers)) != found.layers:
        raise UserError(
            f"{workdir / NAME} is of other layers than the config quantizes; scan again with "
            "--job sensitivity and another --workdir"
        )
    _check_asked(found, asked_by(config, quant), workdir)
    damage = np.stack([found.of(option).mean(1) for option in options], axis=1)
    sizes, chip = linears(run.model, run.tokens, run.text_tokens), parse_target(target).chip
    costs = layer_costs(found.layers, sizes, options, asked.unit, chip, config["kernels"])
    solution = solve(found.layers, options, damage, costs, asked.most, segments)
    rows = _rows(found, options, damage, costs, solution, quant)
    if measure:
        rows = _measured(rows, found, config, workdir)
    bits = rows[0].quant.bits
    write_bits(workdir / BITS, bits, _notes(asked, rows, segments))
    parts = len(segments_of(rows[0].quant, names, run.model.num_layers))
    return "\n".join(
        [
            describe_layers(run.model, rows[0].quant),
            _table(rows, asked),
            *left_out(quant),
            _bound(solution),
            f"{parts} segment{'s' * (parts > 1)} of blocks; to train with it: "
            f"--config.quant.bits_file={workdir / BITS}",
        ]
    )


def _options(found: Sensitivity) -> list[Candidate]:
    options = [each for each in found.candidates if each.whole]
    if len(options) < 2:
        raise UserError(
            f"the scan has {', '.join(each.name for each in options) or 'no'} bits for both "
            "operands, a plan needs two; scan more, such as --candidates=w3a3,w4a4,w8a8"
        )
    return options


def _check_asked(found: Sensitivity, now: Mapping, workdir: Path, otherwise: str = "") -> None:
    changed = [key for key, value in now.items() if found.asked.get(key) != value]
    if changed:
        raise UserError(
            f"{workdir / NAME} asked with another {', '.join(changed)} than the config says now; "
            f"scan again in another --workdir{otherwise}"
        )


def _rows(
    found: Sensitivity,
    options: list[Candidate],
    damage: np.ndarray,
    costs: np.ndarray,
    solution: Solution,
    quant: QuantConfig,
) -> list[Row]:
    """The plan, and every option everywhere."""
    chosen = solution.chosen
    bits = {name: tuple(options[place]) for name, place in zip(found.layers, chosen, strict=True)}
    planned = dataclasses.replace(quant, bits=bits)
    rows = [Row("planned", planned, total(costs, chosen), solution.damage)]
    for place, option in enumerate(options):
        sums = costs[:, place].sum(), damage[:, place].sum()
        rows.append(Row(f"all {option.name}", at(quant, option), *map(float, sums)))
    return rows


def _measured(rows: list[Row], found: Sensitivity, config: Mapping, workdir: Path) -> list[Row]:
    timesteps = tuple(found.timesteps)
    probed = read_probed(config, workdir, found.asked["clips"], timesteps)
    _check_asked(found, probed.asked, workdir, ", or plan with --nomeasure")
    return [row._replace(measured=_damage(row.quant, probed)) for row in rows]


def _damage(quant: QuantConfig, probed: Probed) -> float:
    names = probed.probe.names
    states = switched_params(probed.teacher, names, quant, probed.activations)
    return float(probed.probe.damage(*states).mean())


def _table(rows: list[Row], budget: Budget) -> str:
    lines = [
        f"{'within ' + str(budget):22s}{budget.unit:>12s}"
        f"{'predicted error, %':>22s}{'measured, %':>14s}"
    ]
    for row in rows:
        measured = "not asked" if row.measured is None else _percent(row.measured)
        fits = "" if row.cost <= budget.most * (1 + 1e-6) else "   over the budget"
        lines.append(
            f"{row.name:22s}{row.cost:12.4g}{_percent(row.predicted):>22s}{measured:>14s}{fits}"
        )
    return "\n".join(lines)


def _percent(damage: float) -> str:
    return f"{100 * damage**0.5:.3g}"


def _bound(solution: Solution) -> str:
    if not solution.timed_out:
        return "no other plan has less predicted error"
    low = _percent(max(solution.bound, 0.0))
    return f"the solver's time was up: another plan may have {low} % predicted error, none less"


def _notes(budget: Budget, rows: list[Row], segments: int) -> dict:
    return {
        "budget": str(budget),
        "segments": segments,
        "rows": [
            {
                "name": row.name,
                budget.unit: row.cost,
                "predicted": row.predicted,
                "measured": row.measured,
            }
            for row in rows
        ],
    }
