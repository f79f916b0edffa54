"""`--job study`: run what is missing, then write the tables and figures of what there is."""

from collections.abc import Mapping
from pathlib import Path

from qvgen_jax.errors import UserError
from qvgen_jax.study import record
from qvgen_jax.study.compare import standing
from qvgen_jax.study.figures import write_figures
from qvgen_jax.study.grid import read_cells
from qvgen_jax.study.runner import run_cells
from qvgen_jax.study.tables import write_tables


def run_study(grid: Mapping, study: Path) -> Path:
    """Run a grid's missing cells; the folder of the tables and figures.

    Args:
        grid: a config such as `configs/study_tiny.py`.
        study: where records are kept, `<stage>/<cell>.json`.

    Raises:
        UserError: the grid is wrong, finals are asked for before their screening is there, or
            cells failed.
    """
    if grid["recipe"] not in ("", *grid["variants"]):
        raise UserError(
            f"recipe={grid['recipe']!r} is no variant of the grid; there are "
            f"{', '.join(grid['variants'])}"
        )
    cells = read_cells(grid, chosen_variants(grid, study))
    docs = Path(grid["docs"] or study / "docs")

    def write() -> None:
        write_tables(study, docs, grid["recipe"])
        write_figures(study, docs)

    outcome = run_cells(grid, study, cells, write)
    write()
    if outcome.failed:
        names = ", ".join(cell.name for cell in outcome.failed)
        where = record.failure_path(study, outcome.failed[0])
        raise UserError(
            f"{len(outcome.failed)} of {len(cells)} cells failed ({names}); the first one's last "
            f"lines are in {where}. The same command tries them again"
        )
    return docs


def chosen_variants(grid: Mapping, study: Path) -> list[str]:
    """The grid's variants; of finals, an earlier stage's best and those that always take part.

    Raises:
        UserError: a cell of the earlier stage has no result yet, or one of another config.
    """
    variants, rule = list(grid["variants"]), grid["finalists"]
    earlier = rule["grid"]
    if not earlier:
        return variants
    if rule["names"]:
        return list(rule["names"])
    folder = study / earlier["stage"]
    waited_for = read_cells(earlier, [name for name in variants if name not in rule["without"]])
    reasons = {cell.name: record.outdated(study, cell) for cell in waited_for}
    missing = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise UserError(
            f"finalists are chosen by {folder}, which lacks {', '.join(missing[:5])}{more}: finish "
            "that stage first, leave variants out of the choice by finalists.without, or choose "
            "by hand in finalists.names"
        )
    places = standing(record.read_stage(study, earlier["stage"]), earlier["bits"])
    best = [name for name in sorted(places, key=places.get) if name in variants]
    best = [name for name in best if name not in rule["always"]][: rule["best"]]
    return [name for name in variants if name in (*best, *rule["always"])]
