"""Quantization error layer by layer: a page for every group of layers, from the last validation."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from qvgen_jax.evaluation.report.curves import Panel
from qvgen_jax.evaluation.report.figure import ACCENT, GREEN, MUTED, WARM, figure
from qvgen_jax.evaluation.report.table import WIDE, Cell, Head, table
from qvgen_jax.evaluation.report.training import panels_grid
from qvgen_jax.evaluation.report.words import missing, number, significant, whole

_BLOCK = re.compile(r"^(?:\w*_)?blocks\.(?:(\d{1,6})\.)?(.+)$")
_COLOURS = (ACCENT, WARM, GREEN, MUTED)
_STYLES = ("-", "--", ":", "-.")


class Layer(NamedTuple):
    """`name` as the model has it, split into the block's number, if any, and the linear's name
    in its group; `found` holds what the validation says of it."""

    name: str
    block: int | None
    linear: str
    found: dict


def last_layers(validations: Sequence[dict]) -> tuple[int, Mapping[str, dict]] | None:
    """Step and layers of the last validation that measured any."""
    rows = [row for row in validations if row.get("layers")]
    return (rows[-1]["step"], rows[-1]["layers"]) if rows else None


def group_layers(layers: Mapping[str, dict]) -> dict[str, list[Layer]]:
    """Layers by what they belong to, as models name it: attn1, attn2, ffn, condition_embedder."""
    groups: dict[str, list[Layer]] = {}
    for name, found in layers.items():
        inside = _BLOCK.match(name)
        block, rest = (inside[1], inside[2]) if inside else (None, name)
        group, _, linear = rest.partition(".")
        layer = Layer(name, int(block) if block else None, linear or group, found)
        groups.setdefault(group, []).append(layer)
    return {group: sorted(rows, key=lambda row: row.block or 0) for group, rows in groups.items()}


def page_names(groups: Sequence[str]) -> dict[str, str]:
    """Group -> its page's file name: letters, digits and dashes, and no two the same."""
    names: dict[str, str] = {}
    for order, group in enumerate(groups):
        plain = re.sub(r"[^a-z0-9]+", "-", group.lower()).strip("-")[:40]
        name = f"layers-{plain}.html"
        names[group] = f"layers-{plain}-{order}.html" if name in names.values() else name
    return names


def layers_section(last: tuple[int, Mapping[str, dict]] | None) -> str:
    """The groups, with links to their pages."""
    if not last:
        return missing(
            "No validation measured the layers one by one (<code>validation.jsonl</code>)."
        )
    step, layers = last
    groups = group_layers(layers)
    items = "".join(
        f'<li><a href="{address}">{escape(group)}</a> {_summary(groups[group])}</li>'
        for group, address in page_names([*groups]).items()
    )
    return (
        f"<p>At step {whole(step)}: how far every quantized weight is from the one it stands for, "
        f'and what is left of its low-rank branch.</p><ul class="groups">{items}</ul>'
    )


def _summary(rows: Sequence[Layer]) -> str:
    errors = [error for row in rows if (error := row.found.get("weight_error")) is not None]
    count = f"{len(rows)} layers" if len(rows) > 1 else "1 layer"
    if len(errors) < 2:
        return f"<span>{count}, weight error {significant(errors[0] if errors else None)}</span>"
    mean, most = significant(float(np.mean(errors))), significant(max(errors))
    return f"<span>{count}, weight error {mean} in the mean, {most} at most</span>"


def layer_page(group: str, step: int, rows: Sequence[Layer]) -> str:
    """The body of a group's page: figures by block, and a table of all layers."""
    panels = [
        Panel(
            "Weight error",
            "Norm of quantized minus true weights by the norm of the true ones, block by block; "
            "the branch is left out.",
            _by_block(rows, "Weight error", ["weight_error"]),
        ),
        Panel(
            "Singular values of the branch",
            "Of every layer’s Φ, the largest that are left; logarithmic.",
            _spectra(rows),
        ),
        Panel(
            "Clips",
            "What the least and the greatest value of a token (low: dashed) are multiplied by "
            "before rounding, block by block; means over timesteps.",
            _by_block(rows, "Clips", ["clip_high", "clip_low"]),
        ),
    ]
    figures = panels_grid(panels, "Nothing to draw: see the table.")
    return (
        '<p class="eyebrow"><a href="index.html">Report of the run</a></p>'
        f"<h1>{escape(group)} <span>layer by layer</span></h1>"
        f'<p class="lead">{_summary(rows)}, at step {whole(step)}.</p>'
        f"<section><h2>Figures</h2>{figures}</section>"
        f"<section><h2>Every layer</h2>{_table(rows)}</section>"
    )


def _table(rows: Sequence[Layer]) -> str:
    heads = "Layer", "Weight error", "Branch norm", "Singular values", "Clip, low", "Clip, high"
    named = [(row.name, _cells(row.found)) for row in rows]
    return table("Every layer", [*map(Head, heads)], named, WIDE)


def _cells(found: dict) -> list[Cell]:
    error, norm = found.get("weight_error"), found.get("branch_norm")
    clips = found.get("clip_low"), found.get("clip_high")
    return [
        Cell(significant(error), value=error),
        Cell(significant(norm) if norm is not None else "no branch", value=norm),
        _spectrum_cell(_spectrum(found)),
        *(Cell(number(clip, 3), value=clip) for clip in clips),
    ]


def _spectrum(found: dict) -> list[float]:
    """The singular values that are known, the largest first."""
    known = [value for value in found.get("singular_values") or () if value is not None]
    return sorted(known, reverse=True)


def _spectrum_cell(values: Sequence[float]) -> Cell:
    if not values:
        return Cell("–")
    most, least = significant(values[0]), significant(values[-1])
    return Cell(most if len(values) == 1 else f"{most} to {least}", value=values[0])


def _by_block(rows: Sequence[Layer], title: str, keys: Sequence[str]) -> str | None:
    """A line for every linear over the blocks; None where there are no two blocks to compare."""
    blocks = {row.block for row in rows if row.block is not None}
    known = [row for row in rows if all(row.found.get(key) is not None for key in keys)]
    if len(blocks) < 2 or not known:
        return None

    def draw(ax) -> None:
        for linear, style in _styles(rows).items():
            own = [row for row in known if row.linear == linear and row.block is not None]
            for order, key in enumerate(keys):
                label = {} if order else {"label": linear}
                values = [row.found[key] for row in own]
                dashed = {"linestyle": "--"} if key == "clip_low" else {}
                look = {**style, **dashed, "marker": "o", "ms": 2.5}
                ax.plot([row.block for row in own], values, **look, **label)
        if len(keys) == 1:
            ax.set_ylim(bottom=0)
        _legend(ax)

    return figure(title, title, draw, (min(blocks), max(blocks)), along="block")


def _spectra(rows: Sequence[Layer]) -> str | None:
    known = [(row, _spectrum(row.found)) for row in rows if _spectrum(row.found)]
    if not known:
        return None
    longest = max(len(values) for _, values in known)

    def draw(ax) -> None:
        named = set()
        for row, values in known:
            label = {} if row.linear in named else {"label": row.linear}
            named.add(row.linear)
            dotted = {"marker": "o", "ms": 2.5} if longest <= 40 else {}
            style = _styles(rows)[row.linear]
            ax.plot(np.arange(1, len(values) + 1), values, alpha=0.7, **style, **label, **dotted)
        if any(values[0] > 0 for _, values in known):
            ax.set_yscale("log")
        _legend(ax)

    return figure("Singular values", "Singular values", draw, (1, longest), along="singular value")


def _styles(rows: Sequence[Layer]) -> dict[str, dict]:
    """Linear -> how its line is drawn: four colours, then dashed, then dotted."""
    linears = dict.fromkeys(row.linear for row in rows)
    return {
        linear: {
            "color": _COLOURS[order % len(_COLOURS)],
            "linestyle": _STYLES[order // len(_COLOURS) % len(_STYLES)],
            "linewidth": 1.4,
        }
        for order, linear in enumerate(linears)
    }


def _legend(ax) -> None:
    """Above the axes, where the other figures name their phases."""
    _, labels = ax.get_legend_handles_labels()
    if len(labels) <= 8:
        ax.legend(
            loc="lower left",
            bbox_to_anchor=(-0.02, 0.98),
            ncols=4,
            frameon=False,
            labelcolor="linecolor",
            handlelength=0.9,
            columnspacing=0.8,
            handletextpad=0.4,
            borderpad=0.2,
        )
