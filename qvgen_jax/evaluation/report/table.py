"""A table that `tables.js` sorts: by a click on a column's head, or by keyboard."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

CARDS, WIDE = "cards", "wide"
"""On a phone: a card for each row, or a table that is scrolled sideways inside of its frame."""


class Head(NamedTuple):
    """A column: its text; `drawing`, HTML, stands instead of it in a column of drawings."""

    text: str
    drawing: str = ""


class Cell(NamedTuple):
    """HTML, a second smaller line, and the number that the column is sorted by (None: last)."""

    html: str
    detail: str = ""
    value: float | None = None


def table(
    label: str, heads: Sequence[Head], rows: Sequence[tuple[str, Sequence[Cell]]], shape: str
) -> str:
    """The HTML of a table.

    Args:
        label: what the table shows, read aloud.
        heads: of all columns, the first is the rows' names'.
        rows: each one's name, a text, and its cells.
        shape: `CARDS` or `WIDE`.
    """
    # Where style sheets show a table as blocks, browsers forget that it is one: so every part says.
    columns = "".join(map(_head, heads))
    body = "".join(_row(name, cells, heads[1:]) for name, cells in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f'<table class="sortable {shape}" role="table" aria-label="{escape(label)}">'
        f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead>'
        f'<tbody role="rowgroup">{body}</tbody></table></div>'
    )


def _head(head: Head) -> str:
    if head.drawing:
        return (
            f'<th scope="col" role="columnheader" class="dots" data-fixed '
            f'aria-label="{escape(head.text)}">{head.drawing}</th>'
        )
    return f'<th scope="col" role="columnheader">{escape(head.text)}</th>'


def _row(name: str, cells: Sequence[Cell], heads: Sequence[Head]) -> str:
    drawn = "".join(_cell(cell, head) for cell, head in zip(cells, heads, strict=True))
    return f'<tr role="row"><th scope="row" role="rowheader">{escape(name)}</th>{drawn}</tr>'


def _cell(cell: Cell, head: Head) -> str:
    if head.drawing:
        return f'<td role="cell" class="dots">{cell.html}</td>'
    small = f"<small>{cell.detail}</small>" if cell.detail else ""
    known = cell.value is not None and math.isfinite(cell.value)
    value = f"{cell.value:.9g}" if known else ""
    return (
        f'<td role="cell" data-label="{escape(head.text)}" data-value="{value}">'
        f"<span>{cell.html}{small}</span></td>"
    )
