"""`--job evaluate --export NAME=FOLDER ...`: full precision against any number of exports."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax

from qvgen_jax import hosts
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.asked import parse_part
from qvgen_jax.evaluation.evaluate import REFERENCE, Variant, evaluate_variants
from qvgen_jax.evaluation.finish import untrained, untrained_name
from qvgen_jax.evaluation.report import write_report
from qvgen_jax.evaluation.samples import load_to_generate, slug
from qvgen_jax.evaluation.table import table
from qvgen_jax.mesh import mesh_to_generate
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.training.check import check_config

_LONGEST = 100  # Characters of a name.


def parse_exports(given: Sequence[str], taken: Sequence[str] = ()) -> dict[str, str]:
    """`NAME=FOLDER` of each, as name -> folder.

    Args:
        given: what followed each `--export`.
        taken: names of other variants.

    Raises:
        UserError: one is something else, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, equals, folder = (part.strip() for part in text.partition("="))
        if not (name and equals and folder):
            raise UserError(
                f"--export={text}; expected NAME=FOLDER, such as "
                '--export "QVGen W4A4=runs/tiny_w4a4/export"'
            )
        if not slug(name) or not name.isprintable() or "|" in name or len(name) > _LONGEST:
            raise UserError(
                f"--export={text}; a name is a column of a table and part of a folder's: expected "
                f"at most {_LONGEST} printable characters with a letter or digit of a to z, 0 to "
                "9 among them, and no |"
            )
        if name in found or name in taken:
            raise UserError(f"--export={text}; there is a {name!r} already: choose another name")
        found[name] = folder
    return found


def run_evaluate(config: Mapping, workdir: Path, exports: Sequence[str], part: str = "0/1") -> str:
    """Compare exports with `config.model` and, if asked, with its round-to-nearest.

    One pipeline is in memory at a time. Processes of one run take a part each, with their own
    devices. Where the workdir holds a run, whose export is then one of them, its report is written
    anew.

    Args:
        config: the run's.
        workdir: of the comparison; nothing is trained.
        exports: `NAME=FOLDER` each.
        part: "i/n", the i-th of n machines at work on one disk.

    Returns:
        The tables; a sentence while other parts are at work.

    Raises:
        UserError: see `parse_exports` and `evaluate_variants`; no videos are asked for; the workdir
            holds a run of which nothing is compared; or several processes do not see one folder.
    """
    check_config(config)
    if not config["evaluate"]["videos"]:
        raise UserError("--config.evaluate.videos=0 leaves nothing to compare; give their number")
    nearest = [untrained_name(config)] * bool(config["evaluate"]["round_to_nearest"])
    folders = parse_exports(exports, [REFERENCE, *nearest])
    holds_run = _check_workdir(workdir, folders)
    which = _part(part, workdir)
    reference = partial(_load, config, config["model"])
    variants = {REFERENCE: Variant(reference)}
    for name in nearest:
        variants[name] = Variant(lambda: untrained(config, reference()))
    for name, folder in folders.items():
        variants[name] = Variant(partial(_load, config, folder), packed=True)
    workdir.mkdir(parents=True, exist_ok=True)
    result = evaluate_variants(config, workdir, variants, which)
    if result is None:
        return f"part {which[0]} of {which[1]} is done; the one that ends last writes the tables"
    if holds_run and hosts.is_first():
        print(f"report: {write_report(workdir)}")
    return table(result)


def _check_workdir(workdir: Path, folders: Mapping[str, str]) -> bool:
    """Whether a run lives there; then its own export must be compared, or its report would lie."""
    own = workdir / "export"
    holds_run = (workdir / "metrics.jsonl").is_file()
    if holds_run and own.resolve() not in {Path(folder).resolve() for folder in folders.values()}:
        raise UserError(
            f"{workdir} holds a run whose export is not among those to compare, and whose report "
            f'would show the others\' numbers: add --export "NAME={own}", or give another --workdir'
        )
    return holds_run


def _part(text: str, workdir: Path) -> tuple[int, int]:
    which = parse_part(text)
    if hosts.is_alone():
        return which
    if which != (0, 1):
        raise UserError(
            f"--part={text} is for single processes; the {jax.process_count()} of this run share "
            "the work by themselves: leave it away"
        )
    if not hosts.share(workdir):
        raise UserError(
            f"the processes of this run do not all see {workdir}: give a --workdir on a disk that "
            "they share, or evaluate in one process"
        )
    return jax.process_index(), jax.process_count()


def _load(config: Mapping, folder: str) -> Pipeline:
    mesh = mesh_to_generate(jax.local_devices())
    return load_to_generate(config, folder, config["compute_dtype"], mesh)
