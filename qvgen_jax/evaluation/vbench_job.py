"""`--job vbench`: a tree of videos for each variant, the official scores if asked, and a table."""

import importlib.util
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from qvgen_jax import hosts
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.asked import parse_part
from qvgen_jax.evaluation.samples import load_to_generate
from qvgen_jax.evaluation.vbench import (
    PAPER,
    VBENCH,
    VBENCH_2,
    Row,
    Suite,
    read_prompts,
    read_scores,
    rows_of,
    table,
    write_tree,
)

_FIND = """
import importlib.util, sys
spec = importlib.util.find_spec(sys.argv[1])
print((spec and spec.origin) or "")
"""
_SCORE = """
import importlib, json, sys
import torch
package, scorer, info, out, videos, name, dimensions = sys.argv[1:]
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
getattr(importlib.import_module(package), scorer)(device, info, out).evaluate(
    videos_path=videos, name=name, dimension_list=json.loads(dimensions)
)
"""


def find_info(given: str, python: str, suite: Suite = VBENCH) -> Path:
    """The prompts of the installed package: as given, of its own environment, or of this one.

    Raises:
        UserError: there is no package.
    """
    if given:
        return Path(given)
    origin = None
    if python:
        origin = _output([python, "-c", _FIND, suite.package]).strip()
    elif spec := importlib.util.find_spec(suite.package):
        origin = spec.origin
    if not origin:
        raise UserError(
            f"no {suite.package} package {'for ' + python if python else 'here'}: install it in "
            "an environment of its own and name that one's --vbench_python, or give "
            f"--vbench_info, the path of its {suite.info}"
        )
    return Path(origin).with_name(suite.info)


def run_vbench(
    config: Mapping,
    workdir: Path,
    *,
    info: str = "",
    dimensions: str = "paper",
    smoke: bool = False,
    part: str = "0/1",
    python: str = "",
    second: bool = False,
) -> str:
    """Writes `workdir/vbench/<variant>/videos`; the table of what is scored by then.

    A smoke tree is below `workdir/vbench_smoke`, one of VBench-2.0 below `workdir/vbench2`.

    Args:
        config: the run's.
        workdir: its export is a variant, if there is one; the full-precision model always.
        info: path of the package's list of prompts; looked for if empty.
        dimensions: "paper" (of VBench-2.0: all), "all", or names with commas between.
        smoke: two prompts of each folder, two videos each.
        part: "i/n", see `write_tree`.
        python: of an environment with vbench; the first part then scores what is complete.
        second: whether it is VBench-2.0.

    Raises:
        UserError: several processes of one run, no package, an unknown dimension, other videos
            there, or scoring failed.
    """
    if not hosts.is_alone():
        raise UserError("--job vbench is for single processes; share the work by --part i/n")
    suite = VBENCH_2 if second else VBENCH
    which, source = parse_part(part), find_info(info, python, suite)
    prompts = read_prompts(source, suite)
    every = tuple(dict.fromkeys(name for _, names in prompts for name in names))
    choices = {"paper": every if second else PAPER, "all": every}
    asked = choices.get(dimensions) or tuple(dimensions.split(","))
    rows = rows_of(prompts, asked, config["evaluate"]["seed"], smoke, suite)
    models = {"full-precision": config["model"]}
    if (workdir / "export" / "model_index.json").is_file():
        models["export"] = workdir / "export"
    # Apart, so that the whole is not taken for one with other videos.
    root = workdir / (f"{suite.package}_smoke" if smoke else suite.package)
    scores = {}
    for name, model in models.items():
        pipe = load_to_generate(config, model)
        out, size = root / name, config["sample"]["batch_size"]
        write_tree(pipe, out, rows, name=name, batch_size=size, part=which)
        del pipe  # Before the next is loaded.
        if python and not which[0] and all((out / "videos" / row.file).is_file() for row in rows):
            _score(python, suite, source, out, rows)
        scores[name] = read_scores(out / "scores")
    text = table(scores, asked if second else None)
    (root / "table.md").write_text(text + "\n")
    return text


def _score(python: str, suite: Suite, info: Path, out: Path, rows: Sequence[Row]) -> None:
    """Has the official package score every folder that it has not scored yet."""
    for folder in dict.fromkeys(row.folder for row in rows):
        if (out / "scores" / f"{folder}_eval_results.json").is_file():
            continue
        names = sorted({name for row in rows if row.folder == folder for name in row.dimensions})
        where = [str(path.resolve()) for path in (info, out / "scores", out / "videos" / folder)]
        called = [python, "-c", _SCORE, suite.package, suite.scorer]
        _output([*called, *where, folder, json.dumps(names)])


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"{command[0]} does not start ({error.strerror}): give a Python") from error
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"{command[0]} for vbench ended with {done.returncode}: {last[:400]}")
    return done.stdout
