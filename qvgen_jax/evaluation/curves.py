"""Training curves as small inline SVG figures, drawn from the records of metrics.jsonl.

Every panel has the same size and margins, so that they line up in a grid. None names a colour:
strokes and text refer to the page's CSS variables and follow its light and dark mode.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT = 340, 226  # CSS pixels at scale 1
FONT_SIZE = 11.5
RAW_POINTS = 600  # more are thinned to their envelope: the page stays small, spikes stay visible
SMOOTHING = 40  # the moving average spans 1/40 of the run

# Matplotlib wants colours; these placeholders become CSS variables in the finished SVG.
INK, MUTED, RULE, ACCENT, WARM, GREEN = (f"#0000{i:02x}" for i in range(1, 7))
CSS_VARIABLES = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    RULE: "var(--rule)",
    ACCENT: "var(--accent)",
    WARM: "var(--warm)",
    GREEN: "var(--green)",
}
LEARNING_RATES = {
    "lr_weights": "weights",
    "lr_branch": "L, R",
    "lr_scales": "s, z",
    "lr_clips": "clips",
}


class Panel(NamedTuple):
    """One figure: `svg` is None when the run logged nothing for it."""

    title: str
    caption: str
    svg: str | None


class Phase(NamedTuple):
    """A stretch of steps that shares one rank; `end` is where the next begins."""

    start: float
    end: float
    rank: int


def column(records: Sequence[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values ([n] each, float64) of the records that hold a number under `key`."""
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    return tuple(np.array(found, np.float64).reshape(-1, 2).T)


def phases(records: Sequence[dict]) -> list[Phase]:
    """The phases of rank decay, as logged; empty when no rank was logged."""
    steps, ranks = column(records, "rank")
    if not len(steps):
        return []
    starts = [0, *(np.flatnonzero(np.diff(ranks)) + 1)]
    ends = [*starts[1:], len(steps) - 1]
    return [Phase(steps[a], steps[b], int(ranks[a])) for a, b in zip(starts, ends, strict=True)]


def training_panels(records: Sequence[dict]) -> list[Panel]:
    """Loss, gradient norm, rank, gate, learning rates and small singular values over steps.

    And the held-out loss, of a run that was validated.
    """
    spans = phases(records)
    extent = (records[0]["step"], records[-1]["step"])
    average = (
        " Light: every logged step. Dark: moving average within a phase."
        if _window(len(column(records, "loss")[0])) > 1
        else ""
    )

    def panel(title: str, caption: str, keys: Sequence[str], draw: Callable) -> Panel:
        if not any(len(column(records, key)[0]) for key in keys):
            return Panel(title, caption, None)
        return Panel(
            title, caption, figure(title, caption, lambda ax: draw(ax, records), extent, spans)
        )

    held_out = panel(
        "Held-out loss",
        "Student against teacher on clips that training did not see, by the variance of the "
        "teacher’s prediction.",
        ["held_out_loss"],
        _held_out,
    )
    return [
        *([held_out] if held_out.svg else []),
        panel("Loss", f"Student against teacher, mean squared error.{average}", ["loss"], _loss),
        panel(
            "Gradient norm",
            "Before clipping, all parameters together; logarithmic.",
            ["grad_norm"],
            _gradient_norm,
        ),
        panel(
            "Rank",
            "Columns of the low-rank branch Φ that are left; fewer after every phase.",
            ["rank"],
            _rank,
        ),
        panel(
            "Gate",
            "Weight u of the columns of Φ that leave at the end of a phase.",
            ["gate"],
            _gate,
        ),
        panel("Learning rates", "Per parameter group; logarithmic.", [*LEARNING_RATES], _rates),
        panel(
            "Small singular values of Φ",
            "Share of Φ’s singular values more than 14 times below the first of their layer: "
            "directions that can go at little cost.",
            ["small_singular_share"],
            _small_share,
        ),
    ]


def figure(
    title: str,
    description: str,
    draw: Callable,
    extent: tuple[float, float],
    spans: Sequence[Phase] = (),
) -> str:
    """One SVG element: `draw(axes)` in the common frame, over the steps of `extent`; `spans` gives
    the phase boundaries."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": FONT_SIZE}
    with matplotlib.rc_context(style):
        fig = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        ax = fig.add_axes((46 / WIDTH, 40 / HEIGHT, (WIDTH - 54) / WIDTH, (HEIGHT - 62) / HEIGHT))
        draw(ax)
        ax.set_xlim(extent[0], max(extent[1], extent[0] + 1))
        _frame(ax)
        _draw_phases(ax, spans)
        text = io.StringIO()
        fig.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), title, description)


def _loss(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "loss")
    smooth = smooth_by_phase(steps, values, phases(records))
    _trace(ax, steps, values, smooth, ACCENT)
    finite = smooth[np.isfinite(smooth)]
    if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        ax.set_yscale("log")
    else:
        ax.set_ylim(bottom=0)


def _held_out(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "held_out_loss")
    ax.plot(steps, values, color=ACCENT, linewidth=1.8, **_dots(len(steps)))
    ax.set_ylim(bottom=0)


def _gradient_norm(ax, records: Sequence[dict]) -> None:
    steps, values = column(records, "grad_norm")
    _trace(ax, steps, values, smooth_by_phase(steps, values, phases(records)), ACCENT)
    if (values > 0).any():
        ax.set_yscale("log")


def _rank(ax, records: Sequence[dict]) -> None:
    steps, ranks = column(records, "rank")
    level = np.where(ranks > 0, np.log2(np.maximum(ranks, 1)) + 1, 0)  # 0, 1, 2, 4, ... evenly
    ax.step(steps, level, where="post", color=ACCENT, linewidth=1.8)
    present = sorted({int(rank) for rank in ranks} | {0})
    ax.set_yticks([math.log2(rank) + 1 if rank else 0 for rank in present], map(str, present))
    ax.set_ylim(-0.25, max(level.max(), 1) + 0.4)


def _gate(ax, records: Sequence[dict]) -> None:
    """One falling line per phase; without a rank left there is nothing to weigh."""
    present = [record for record in records if record.get("rank") != 0]
    for span in phases(present) or [Phase(-math.inf, math.inf, -1)]:
        steps, values = column([r for r in present if r.get("rank", -1) == span.rank], "gate")
        ax.plot(steps, values, color=ACCENT, linewidth=1.8, **_dots(len(steps)))
    ax.set_ylim(-0.04, 1.06)
    ax.set_yticks([0, 0.5, 1], ["0", "½", "1"])


def _rates(ax, records: Sequence[dict]) -> None:
    groups: dict[bytes, tuple[list[str], np.ndarray, np.ndarray]] = {}
    for key, label in LEARNING_RATES.items():
        steps, values = column(records, key)
        if len(values) and np.nanmax(values) > 0:
            same = values.tobytes() + steps.tobytes()
            groups.setdefault(same, ([], steps, values))[0].append(label)
    peaks = [values.max() for _, _, values in groups.values()]
    floor = min(peaks, default=1e-5) / 30
    for (labels, steps, values), color in zip(
        groups.values(), (ACCENT, GREEN, WARM, MUTED), strict=False
    ):
        ax.plot(steps, np.maximum(values, floor / 10), color=color, linewidth=1.8)
        peak = values.max()
        x = steps[0] + 0.3 * (steps[-1] - steps[0])
        ax.text(x, peak * 1.35, "; ".join(labels), color=color, ha="left", va="bottom")
    ax.set_yscale("log")
    ax.set_ylim(floor, max(peaks, default=1e-4) * 6)


def _small_share(ax, records: Sequence[dict]) -> None:
    steps, shares = column(records, "small_singular_share")
    ax.plot(steps, 100 * shares, color=ACCENT, linewidth=1.8)
    ax.set_ylim(-3, 106)
    ax.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])


def _trace(ax, steps, values, smooth, color: str) -> None:
    ax.plot(*_thin(steps, values), color=color, linewidth=0.8, alpha=0.32)
    ax.plot(steps, smooth, color=color, linewidth=1.8)


def _dots(count: int) -> dict:
    """Few points are shown as such, so that nobody reads the line between them as measured."""
    return {"marker": "o", "markersize": 3} if count <= 10 else {}


def _thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most RAW_POINTS points: each bin keeps its least and its greatest value."""
    if len(steps) <= RAW_POINTS or not np.isfinite(values).all():
        return steps, values
    kept = []
    for chunk in np.array_split(np.arange(len(steps)), RAW_POINTS // 2):
        kept += sorted({chunk[values[chunk].argmin()], chunk[values[chunk].argmax()]})
    return steps[kept], values[kept]


def _window(count: int) -> int:
    return max(1, count // SMOOTHING)


def smooth_by_phase(steps, values, spans: Sequence[Phase]) -> np.ndarray:
    """Centred moving average that never mixes two phases: the jump at a boundary stays a jump."""
    window = _window(len(steps))
    smooth = np.full(len(values), np.nan)
    starts = np.searchsorted(steps, [span.start for span in spans]).tolist() or [0]
    starts[0] = 0
    for start, end in zip(starts, [*starts[1:], len(values)], strict=True):
        part = values[start:end]
        ones = np.ones(min(window, max(len(part), 1)))
        total = np.convolve(part, ones, "same")
        smooth[start:end] = total / np.convolve(np.ones(len(part)), ones, "same")
    return smooth


def _frame(ax) -> None:
    from matplotlib import ticker

    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.tick_params(colors=MUTED, length=0, pad=5)
    ax.tick_params(axis="x", length=3)
    ax.grid(axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set_xlabel("step", color=MUTED, labelpad=2)
    ax.xaxis.set_major_locator(ticker.MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(
        ticker.FuncFormatter(lambda x, _: f"{x:,.0f}".replace(",", "\u2009"))
    )
    low, high = ax.get_ylim()
    if ax.get_yscale() == "log":
        few = math.log10(high / low) < 1.6
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6))
        ax.yaxis.set_minor_locator(ticker.NullLocator())
        powers_below = 1 if low < 1e-3 else 1e-3
    elif isinstance(ax.yaxis.get_major_formatter(), ticker.ScalarFormatter):
        ax.yaxis.set_major_locator(ticker.MaxNLocator(5, steps=[1, 2, 5, 10]))
        powers_below = 1e-3 if high > 4e-3 else 1
    else:
        return  # this panel chose its own ticks
    ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: _short(y, powers_below)))


def _draw_phases(ax, spans: Sequence[Phase]) -> None:
    for before, span in pairwise(spans):
        if span.rank != before.rank:
            ax.axvline(span.start, color=MUTED, linewidth=0.7, alpha=0.4, zorder=0.5)
    low, high = ax.get_xlim()
    across = ax.get_xaxis_transform()
    for span in spans if len(spans) > 1 else ():
        if span.end - span.start > 0.04 * (high - low):  # narrower ones have no room for a number
            middle = (span.start + span.end) / 2
            ax.text(middle, 1.03, f"{span.rank}", transform=across, color=MUTED, ha="center")


def _short(value: float, powers_below: float) -> str:
    """0.05 as it is, 2e-05 as 2·10⁻⁵, without mathtext."""
    if value == 0 or powers_below * (1 - 1e-9) <= abs(value) < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = round(value / 10.0**exponent, 2)
    power = "10" + str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return power if mantissa == 1 else f"{mantissa:g}·{power}"


def _rounded(attribute: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda n: f"{float(n[0]):.1f}".removesuffix(".0"), attribute)


def _inline(svg: str, title: str, description: str) -> str:
    """Matplotlib's SVG file as an HTML element: no prolog, ids, font lists or namespaces."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"<metadata>.*?</metadata>|<defs>\s*<style.*?</defs>|<!--.*?-->", "", svg, flags=re.S
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    svg = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda found: _rounded(found[0]), svg)
    for placeholder, variable in CSS_VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    svg = re.sub(r"\s*\n\s*", "\n", svg[svg.index(">") + 1 :])
    return (
        f'<svg class="curve" role="img" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"<title>{html.escape(title)}</title><desc>{html.escape(description)}</desc>{svg}"
    )
