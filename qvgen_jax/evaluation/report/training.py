"""How training went: its curves, and what it warned of."""

from collections.abc import Sequence
from html import escape

from qvgen_jax.evaluation.report.curves import Panel, column, training_panels
from qvgen_jax.evaluation.report.words import missing, whole

SHOWN_ALARMS = 20


def training_section(records: Sequence[dict], alarms: Sequence[dict]) -> str:
    _, speeds = column(records, "steps_per_second")
    speed = f" Median speed {sorted(speeds)[len(speeds) // 2]:.2g} steps/s." if len(speeds) else ""
    marks = (
        " Vertical lines mark the phases of rank decay; the number above each is its rank."
        if len(set(column(records, "rank")[1])) > 1
        else ""
    )
    last = whole(max(record["step"] for record in records))
    told = _alarms(records, alarms)
    curves = panels_grid(training_panels(records), "Not logged in this run.")
    return f"<p>Logged up to step {last}.{speed}{marks}</p>{told}{curves}"


def panels_grid(panels: Sequence[Panel], without: str) -> str:
    """Figures that line up; `without` is said of one that has nothing to show."""
    figures = "".join(
        f"<figure><h3>{escape(panel.title)}</h3>{panel.svg or missing(escape(without))}"
        f"<figcaption>{escape(panel.caption)}</figcaption></figure>"
        for panel in panels
    )
    return f'<div class="curves">{figures}</div>'


def _alarms(records: Sequence[dict], alarms: Sequence[dict]) -> str:
    """What the run warned of, and how many updates it left out."""
    items = [f"Step {whole(each['step'])}: {each['alarm']}." for each in alarms]
    _, skipped = column(records, "skipped")
    if len(skipped) and skipped[-1]:
        items.append(f"{whole(skipped[-1])} updates were not finite, and left out.")
    listed = "".join(f"<li>{escape(item)}</li>" for item in items[:SHOWN_ALARMS])
    more = len(items) - SHOWN_ALARMS
    if more > 0:
        listed += f"<li>{more} more in <code>alarms.jsonl</code>.</li>"
    return f'<ul class="note alarms">{listed}</ul>' if items else ""
