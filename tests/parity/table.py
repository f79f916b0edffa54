"""The parity table: every largest relative error that the suite holds, by component and case.

    make parity-table          # writes docs/parity_table.md

A test says `hold("Wan transformer", "odd sizes", error)`; the table keeps the largest of a row.
"""

import platform
from importlib.metadata import version
from pathlib import Path

_ROWS: dict[tuple[str, str], tuple[float, float, int]] = {}


def hold(component: str, case: str, error: float, tolerance: float = 1e-4) -> None:
    """Asserts `error <= tolerance` and keeps it for the table."""
    largest, _, count = _ROWS.get((component, case), (0.0, tolerance, 0))
    _ROWS[component, case] = (max(largest, float(error)), tolerance, count + 1)
    assert error <= tolerance, f"{component}, {case}: {error:.3g} > {tolerance:g}"


def write(path: Path) -> None:
    """Writes what this process has held, as Markdown."""
    named = ("diffusers", "transformers", "torch", "jax")
    versions = ", ".join(f"{name} {version(name)}" for name in named)
    lines = [
        "| component | model and case | comparisons | largest error | tolerance |",
        "|---|---|---|---|---|",
        *(
            f"| {component} | {case} | {count} | {error:.1e} | {tolerance:g} |"
            for (component, case), (error, tolerance, count) in sorted(_ROWS.items())
        ),
        "",
        f"{versions}, Python {platform.python_version()}, CPU, float32, highest matmul precision.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
