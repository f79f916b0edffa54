"""The tree against the real package: its own list of prompts, its own way of finding files.

Its modules import the scorers' libraries, which pin others than ours; so its class and the two
functions that it uses are taken from its source and run alone.
"""

import ast
import importlib.util
import json
import os
import re
from collections import Counter
from pathlib import Path

from qvgen_jax.evaluation.vbench import PAPER, read_prompts, rows_of

SPEC = importlib.util.find_spec("vbench")
assert SPEC is not None and SPEC.origin, "make parity installs vbench"  # noqa: PT018
PACKAGE = Path(SPEC.origin).parent
INFO = PACKAGE / "VBench_full_info.json"


def theirs() -> dict:
    """`VBench` and `get_prompt_from_filename` of the installed package."""
    wanted = {"VBench", "get_prompt_from_filename", "save_json", "load_json"}
    space = {"os": os, "re": re, "json": json, "Path": Path, "print0": space_print}
    for name in ("utils.py", "__init__.py"):
        tree = ast.parse((PACKAGE / name).read_text())
        kept = [node for node in tree.body if getattr(node, "name", None) in wanted]
        exec(compile(ast.Module(kept, []), name, "exec"), space)
    return space


WARNINGS: list[str] = []


def space_print(text: str) -> None:
    if "WARNING" in text:
        WARNINGS.append(text)


def test_the_papers_251_prompts_are_in_the_package():
    prompts = read_prompts(INFO)
    rows = rows_of(prompts, PAPER)
    assert len(rows) == 1255
    found = Counter(folder for folder, _ in {(row.folder, row.prompt) for row in rows})
    assert found == {"overall_consistency": 93, "subject_consistency": 72, "scene": 86}
    every = {name for _, names in prompts for name in names}
    assert len(rows_of(prompts, sorted(every))) == 5 * 946


def test_the_package_finds_every_video_of_a_tree(tmp_path):
    rows, package = rows_of(read_prompts(INFO), PAPER), theirs()
    for folder in ("overall_consistency", "subject_consistency", "scene"):
        videos = tmp_path / "videos" / folder
        videos.mkdir(parents=True)
        mine = [row for row in rows if row.folder == folder]
        for row in mine:
            (tmp_path / "videos" / row.file).touch()
        names = sorted({name for row in mine for name in row.dimensions})
        scorer = package["VBench"]("cpu", str(INFO), str(tmp_path / "scores"))
        WARNINGS.clear()
        found = scorer.build_full_info_json(str(videos), folder, names)
        assert not WARNINGS
        entries = json.loads(Path(found).read_text())
        paths = [Path(path) for entry in entries for path in entry["video_list"]]
        assert sorted(paths) == sorted(tmp_path / "videos" / row.file for row in mine)
        read = package["get_prompt_from_filename"]
        assert {read(str(path)) for path in paths} == {row.prompt for row in mine}
