"""The page's own pieces of HTML: notices, progress bars, timings. No text of a user is among them
but in messages, which are escaped."""

import base64
import io
from collections.abc import Mapping
from html import escape

import numpy as np
from PIL import Image

from qvgen_jax.serve.generate import Progress, Timing, ratio
from qvgen_jax.serve.limits import FULL, LOW

CSS = """
.html-container { padding: 0 !important; }
.qv-head h1 { font-size: 1.35rem; font-weight: 600; margin: 0; }
.qv-head p { margin: .25rem 0 0; color: var(--body-text-color-subdued); }
.qv-note, .qv-error, .qv-side { padding: .6rem .8rem; border-radius: 8px; border: 1px solid; }
.qv-note { border-color: var(--border-color-primary);
  background: var(--background-fill-secondary); }
.qv-error { border-color: var(--error-border-color); background: var(--error-background-fill); }
.qv-side { border-color: var(--border-color-primary); }
.qv-side h2 { font-size: 1rem; font-weight: 600; margin: 0 0 .4rem; }
.qv-side p { margin: .4rem 0 0; font-variant-numeric: tabular-nums; }
.qv-bar { height: .4rem; border-radius: .2rem; overflow: hidden;
  background: var(--border-color-primary); }
.qv-bar > div { height: 100%; background: var(--color-accent); }
.qv-side img { width: 100%; margin: .5rem 0 0; border-radius: 4px; display: block; }
.qv-side table { font-variant-numeric: tabular-nums; margin: 0; }
.qv-side table, .qv-side tr, .qv-side th, .qv-side td { border: 0 !important; }
.qv-side th, .qv-side td { padding: .15rem 1.5rem .15rem 0 !important; text-align: right;
  font-weight: 400; }
.qv-side th:first-child { text-align: left; }
.qv-side thead th { color: var(--body-text-color-subdued); }
"""


def note(text: str) -> str:
    """A quiet line."""
    return f'<div class="qv-note" role="status">{escape(text)}</div>' if text else ""


def error(text: str) -> str:
    """The one message about what went wrong."""
    return f'<div class="qv-error" role="alert">{escape(text)}</div>'


def side(name: str, now: Progress | None = None, idle: str = "") -> str:
    """The card of one side: what is known of it now, or why there is nothing."""
    title = f"<h2>{escape(name[0].upper() + name[1:])}</h2>"
    if now is None:
        return f'<div class="qv-side">{title}<p>{escape(idle)}</p></div>'
    bar = (
        f'<div class="qv-bar" role="progressbar" aria-label="{name}" aria-valuemin="0" '
        f'aria-valuemax="{now.steps}" aria-valuenow="{now.step}">'
        f'<div style="width: {100 * now.step / now.steps:.1f}%"></div></div>'
    )
    told = f"step {now.step} of {now.steps}"
    if now.timing:
        told = f"{now.steps} steps, {_seconds(now.timing.steps)}"
    elif now.step == 0:
        told = "starting; the first step of a new size also compiles"
    picture = ""
    if now.picture is not None and now.frames is None:
        data = base64.b64encode(_png(now.picture)).decode()
        picture = (
            f'<img alt="Preview of {name}: frames from first to last" '
            f'src="data:image/png;base64,{data}">'
        )
    return f'<div class="qv-side">{title}{bar}<p>{told}</p>{picture}</div>'


def times(timings: Mapping[str, Timing]) -> str:
    """A table of what each side took; a sentence about both."""
    rows = "".join(
        f"<tr><th>{name}</th><td>{_seconds(t.step)}</td><td>{_seconds(t.steps)}</td>"
        f"<td>{_seconds(t.decode)}</td></tr>"
        for name, t in timings.items()
    )
    head = "<tr><th></th><th>median step</th><th>all steps</th><th>VAE</th></tr>"
    table = f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"
    told = "All steps and the VAE include what was compiled."
    if quotient := ratio(timings):
        told = f"A {LOW} step took {1 / quotient:.2f} times as long as one in {FULL}. {told}"
    return f'<div class="qv-side">{table}<p>{told}</p></div>'


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"


def _png(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()
