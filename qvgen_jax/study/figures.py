"""The figures of a study as SVG files, drawn from its records alone.

Colours are fixed and the ground is white: the files are shown in Markdown, where no style sheet
reaches them. The same records give the same bytes.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from qvgen_jax.evaluation.report.curves import column, phases, smooth_by_phase
from qvgen_jax.evaluation.report.figure import FONT_SIZE, STYLE, Phase
from qvgen_jax.study import compare
from qvgen_jax.study.record import curve_records, read_stage

WIDTH, HEIGHT = 720, 270  # Points.
INK, MUTED, RULE = "#1f2328", "#59636e", "#d8dee4"
BLUE, ORANGE, GREEN, PURPLE = "#0969da", "#bc4c00", "#1a7f37", "#8250df"

Runs = Mapping[str, Mapping[int, Mapping]]
"""Variant -> seed -> record, of one bit-width."""


def write_figures(study: Path, docs: Path) -> list[Path]:
    """Write those that the records suffice for; their paths.

    All runs in a figure are of one stage. Two bit-widths stand side by side.
    """
    stages = {path.name: read_stage(study, path.name) for path in study.iterdir() if path.is_dir()}
    written = []
    for name, (draw, preferred) in _FIGURES.items():
        for stage in [*preferred, *sorted(set(stages) - set(preferred))]:
            records = stages.get(stage, [])
            widths = compare.bits_of(records)
            panels = {
                f"W{bits[0]}A{bits[1]}, {stage}": compare.at_bits(records, bits) for bits in widths
            }
            if panels and all(draw(None, runs) for runs in panels.values()):
                written.append(docs / f"{name}.svg")
                _write(written[-1], draw, panels)
                break
    return written


def _write(path: Path, draw: Callable, panels: Mapping[str, Runs]) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    style = {**STYLE, "svg.hashsalt": path.stem, "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained", facecolor="white")
        axes = fig.subplots(1, len(panels), squeeze=False)[0]
        for ax, (title, runs) in zip(axes, panels.items(), strict=True):
            draw(ax, runs)
            ax.set_title(title, color=INK, fontsize=FONT_SIZE, loc="left", pad=20)
            _frame(ax)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, format="svg", metadata={"Date": None})


def _frame(ax) -> None:
    from matplotlib import ticker

    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.tick_params(colors=MUTED, length=0)
    ax.grid(axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    for label in (ax.xaxis.label, ax.yaxis.label):
        label.set_color(MUTED)
    if ax.get_yscale() == "log":
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5), numticks=8))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, labelcolor=INK, fontsize=FONT_SIZE - 1.5)


def _run(runs: Runs, variant: str) -> list[dict] | None:
    """The curves of a variant's first seed."""
    seeds = runs.get(variant)
    return curve_records(seeds[min(seeds)]) if seeds else None


def _curve(ax, records: list[dict], key: str, color: str, label: str) -> None:
    """Light: as logged; dark: a moving average that does not cross a phase boundary."""
    steps, values = column(records, key)
    ax.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
    smooth = smooth_by_phase(steps, values, phases(records))
    ax.plot(steps, smooth, color=color, linewidth=1.6, label=label)


def _boundaries(ax, spans: Sequence[Phase]) -> None:
    across = ax.get_xaxis_transform()
    for index, span in enumerate(spans):
        if index:
            ax.axvline(span.start, color=MUTED, linewidth=0.7, alpha=0.45, zorder=0.5)
        middle = (span.start + span.end) / 2
        ax.text(middle, 1.02, f"{span.rank}", transform=across, color=MUTED, ha="center")


def gradient_norm(ax, runs: Runs) -> bool:
    """With and without the low-rank branch. Each figure says whether it can be drawn; draws if
    `ax` is given."""
    default, plain = _run(runs, "default"), _run(runs, "plain_qat")
    if default is None or plain is None:
        return False
    if ax is not None:
        _curve(ax, default, "grad_norm", BLUE, "with Φ")
        _curve(ax, plain, "grad_norm", ORANGE, "without Φ")
        _boundaries(ax, phases(default))
        ax.set_yscale("log")
        ax.set(xlabel="step", ylabel="gradient norm, before clipping")
    return True


def loss_at_boundaries(ax, runs: Runs) -> bool:
    """The loss through every phase; the default beside what removes the branch at once."""
    default = _run(runs, "default")
    if default is None:
        return False
    if ax is not None:
        _curve(ax, default, "loss", BLUE, "default")
        for variant, color in (("no_refactor", GREEN), ("abrupt_end", ORANGE)):
            if (other := _run(runs, variant)) is not None:
                _curve(ax, other, "loss", color, variant.replace("_", " "))
        _boundaries(ax, phases(default))
        ax.set_yscale("log")
        ax.set(xlabel="step", ylabel="distillation loss")
    return True


def small_singular_values(ax, runs: Runs) -> bool:
    """The paper's figure 3: how many directions of a branch of full rank come to matter little."""
    full = _run(runs, "full_rank_kept")
    if full is None:
        return False
    if ax is not None:
        steps, shares = column(full, "small_singular_share")
        ax.plot(steps, 100 * shares, color=BLUE, linewidth=1.8)
        ax.set(xlabel="step", ylabel="singular values below 1/14 of the first, %")
        ax.set_ylim(0, None)
    return True


def end_of_decay(ax, runs: Runs) -> bool:
    """Held-out loss against when the branch is gone, of runs that differ from the default in
    nothing else."""
    found = _decay_ends(runs)
    if len(found) < 2:
        return False
    if ax is not None:
        ends, losses = np.array(sorted(found.items())).T
        ax.plot(100 * ends, losses, color=BLUE, linewidth=1.4, marker="o", markersize=4)
        default = next(iter(runs["default"].values()))["config"]["quant.decay_fraction"]
        ax.plot(100 * default, found[default], color=ORANGE, marker="o", linestyle="none")
        ax.annotate(
            "default",
            (100 * default, found[default]),
            (0, -16),
            textcoords="offset points",
            color=ORANGE,
            ha="center",
        )
        ax.set(xlabel="end of decay, % of training", ylabel="held-out loss")
        ax.margins(y=0.25)
    return True


def _decay_ends(runs: Runs) -> dict[float, float]:
    """`quant.decay_fraction` -> mean held-out loss."""
    if "default" not in runs:
        return {}
    key, seed = "quant.decay_fraction", min(runs["default"])
    base = {k: v for k, v in runs["default"][seed]["config"].items() if k != key}
    found = {}
    for seeds in runs.values():
        config = seeds[seed]["config"] if seed in seeds else {}
        if {k: v for k, v in config.items() if k != key} == base:
            loss = compare.held_out_loss(seeds[seed])
            if np.isfinite(loss):
                found[config[key]] = loss
    return found


# Name -> how to draw it, and the stages to take it from: longer runs first, or those with more
# variants to compare.
_FIGURES = {
    "gradient_norm": (gradient_norm, ("finals", "screening")),
    "loss_at_boundaries": (loss_at_boundaries, ("screening", "finals")),
    "small_singular_values": (small_singular_values, ("finals", "screening")),
    "end_of_decay": (end_of_decay, ("screening", "finals")),
}
