"""The heat map of a scan: kinds of layers, block by block, against timesteps."""

from pathlib import Path

import numpy as np

from qvgen_jax.mixed.sensitivity import Sensitivity
from qvgen_jax.quant.blocks import split_block

_WIDTH = 2.6  # Inches of a candidate's panel.
_LEAST, _MOST = 4.0, 20.0  # Of the figure's height.
_ROW = 0.11
_LABELS = 60  # So many lines of text fit on the figure's height.


def draw_heat_map(path: Path, found: Sensitivity) -> None:
    """Writes a PNG, a panel for each candidate, colours on one logarithmic scale."""
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    names = [split_block(name) for name in found.layers]
    kinds = [kind for _, kind in names]
    order = sorted(range(len(kinds)), key=lambda i: (kinds.index(kinds[i]), i))
    # A layer outside the blocks is alone under its label: high enough for that.
    tall = max(1.0, len(order) / _LABELS)
    rows = np.cumsum([0.0, *(tall if names[i][0] is None else 1.0 for i in order)])
    # The error, not its square, in per cent; nothing is exactly without any.
    errors = [100 * np.sqrt(found.of(each)[order]) for each in found.candidates]
    floor = max(1e-4, min(e[e > 0].min(initial=100) for e in errors))
    norm = LogNorm(floor, max(max(e.max() for e in errors), 2 * floor))
    height = float(np.clip(_ROW * rows[-1], _LEAST, _MOST))
    fig = Figure(figsize=(2 + _WIDTH * len(errors), height), dpi=120, layout="constrained")
    axes = fig.subplots(1, len(errors), sharey=True, squeeze=False)[0]
    columns = np.arange(len(found.timesteps) + 1) - 0.5
    for ax, candidate, error in zip(axes, found.candidates, errors, strict=True):
        mesh = ax.pcolormesh(columns, rows, np.maximum(error, floor), norm=norm, cmap="magma_r")
        ax.set_title(candidate.name.upper(), loc="left")
        ax.set(xlabel="timestep", xticks=range(len(found.timesteps)))
        ax.set_xticklabels(found.timesteps)
        _mark_kinds(ax, [kinds[i] for i in order], rows)
    axes[0].invert_yaxis()  # The panels share it.
    fig.colorbar(mesh, ax=axes, label="relative error of the prediction, %")
    fig.savefig(path, metadata={"Software": None})


def _mark_kinds(ax, kinds: list[str], rows: np.ndarray) -> None:
    """A label in the middle of each kind's rows, and lines between them."""
    names = list(dict.fromkeys(kinds))
    starts = [kinds.index(name) for name in names]
    ends = [*starts[1:], len(kinds)]
    middles = [(rows[a] + rows[b]) / 2 for a, b in zip(starts, ends, strict=True)]
    ax.set_yticks(middles, names, fontsize=6)
    for start in starts[1:]:
        ax.axhline(rows[start], color="white", linewidth=0.8)
