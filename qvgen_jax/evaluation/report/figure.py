"""A small figure as an inline SVG element, in the frame that all figures of the report share.

Every figure has the same size and margins, so that they line up in a grid. None names a colour:
strokes and text refer to the page's CSS variables and follow its light and dark mode.
"""

import html
import io
import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from qvgen_jax.evaluation.report.words import power_of_ten

WIDTH, HEIGHT = 340, 226  # CSS pixels at scale 1
FONT_SIZE = 11.5
# Names of layers and variants are texts: a dollar in one begins no formula.
STYLE = {"svg.fonttype": "none", "font.size": FONT_SIZE, "text.parse_math": False}

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


class Phase(NamedTuple):
    """A stretch of steps that shares one rank; `end` is where the next begins."""

    start: float
    end: float
    rank: int


def figure(
    title: str,
    description: str,
    draw: Callable,
    extent: tuple[float, float],
    spans: Sequence[Phase] = (),
    along: str = "step",
) -> str:
    """One SVG element in the common frame.

    Args:
        title, description: what is read aloud.
        draw: draws on matplotlib's axes.
        extent: the ends of the horizontal axis.
        spans: phases, whose boundaries are marked.
        along: what the horizontal axis counts, in integers.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}):
        fig = Figure(figsize=(WIDTH / 72, HEIGHT / 72))
        ax = fig.add_axes((46 / WIDTH, 40 / HEIGHT, (WIDTH - 54) / WIDTH, (HEIGHT - 62) / HEIGHT))
        draw(ax)
        ax.set_xlim(extent[0], max(extent[1], extent[0] + 1))
        _frame(ax, along)
        _draw_phases(ax, spans)
        text = io.StringIO()
        fig.savefig(text, format="svg", transparent=True)
    return _inline(text.getvalue(), title, description)


def _frame(ax, along: str) -> None:
    from matplotlib import ticker

    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.spines["bottom"].set_color(MUTED)
    ax.tick_params(colors=MUTED, length=0, pad=5)
    ax.tick_params(axis="x", length=3)
    ax.grid(axis="y", color=RULE, linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set_xlabel(along, color=MUTED, labelpad=2)
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
    """Of a tick, which has no zeros at its end: 0.05 as it is, 2e-05 as 2·10⁻⁵."""
    if value == 0 or powers_below * (1 - 1e-9) <= abs(value) < 1e4:
        return f"{value:g}"
    exponent = math.floor(math.log10(abs(value)) + 1e-9)
    mantissa = round(value / 10.0**exponent, 2)
    power = power_of_ten(exponent)
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
