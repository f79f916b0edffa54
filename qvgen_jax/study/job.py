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
    cells = read_cells(grid, chosen_variants(grid, study))
    docs = Path(grid["docs"] or study / "docs")

    def write() -> None:
        write_tables(study, docs)
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
        UserError: the earlier stage has no result yet for some variant.
    """
    variants, rule = list(grid["variants"]), grid["finalists"]
    if not rule["stage"]:
        return variants
    if rule["names"]:
        return list(rule["names"])
    places = standing(record.read_stage(study, rule["stage"]))
    missing = [name for name in variants if name not in places and name not in rule["without"]]
    if missing:
        raise UserError(
            f"finalists are chosen by {study / rule['stage']}, which lacks {', '.join(missing)}: "
            f"finish that stage first, or name them in the grid's finalists.names"
        )
    best = [name for name in sorted(places, key=places.get) if name in variants]
    best = [name for name in best if name not in rule["always"]][: rule["best"]]
    return [name for name in variants if name in (*best, *rule["always"])]
