"""The tree against the real packages: their own lists of prompts, their own ways of finding files.

Their modules import the scorers' libraries, which pin others than ours; so their classes and the
functions that these use are taken from their source and run alone.
"""

import ast
import importlib.util
import json
import os
import re
from collections import Counter
from pathlib import Path

from qvgen_jax.evaluation.vbench import PAPER, VBENCH, VBENCH_2, Suite, read_prompts, rows_of


def folder_of(suite: Suite) -> Path:
    spec = importlib.util.find_spec(suite.package)
    assert spec is not None and spec.origin, "make parity installs it"  # noqa: PT018
    return Path(spec.origin).parent


INFO = folder_of(VBENCH) / VBENCH.info
INFO_2 = folder_of(VBENCH_2) / VBENCH_2.info


def theirs(suite: Suite) -> dict:
    """The class and `get_prompt_from_filename` of an installed package."""
    wanted = {suite.scorer, "get_prompt_from_filename", "save_json", "load_json"}
    said = {"print0": space_print, "print": space_print}
    space = {"os": os, "re": re, "json": json, "Path": Path, **said}
    for name in ("utils.py", "__init__.py"):
        tree = ast.parse((folder_of(suite) / name).read_text())
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
    rows, package = rows_of(read_prompts(INFO), PAPER), theirs(VBENCH)
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


def test_vbench_2_has_3857_videos_in_18_folders():
    prompts = read_prompts(INFO_2, VBENCH_2)
    assert len(prompts) == 1230
    rows = rows_of(
        prompts, sorted({name for _, names in prompts for name in names}), suite=VBENCH_2
    )
    # One prompt is listed twice, under one dimension.
    assert len(rows) == 20 * 10 + 3 * (1230 - 10 - 1) == 3857
    assert len({row.file for row in rows}) == len(rows)
    assert len({row.folder for row in rows}) == 18


def test_the_package_of_vbench_2_finds_every_video_of_a_tree(tmp_path):
    prompts, package = read_prompts(INFO_2, VBENCH_2), theirs(VBENCH_2)
    dimensions = sorted({name for _, names in prompts for name in names})
    rows = rows_of(prompts, dimensions, suite=VBENCH_2)
    for dimension in dimensions:
        videos = tmp_path / "videos" / dimension
        videos.mkdir(parents=True)
        mine = [row for row in rows if row.folder == dimension]
        for row in mine:
            (tmp_path / "videos" / row.file).touch()
        scorer = package["VBench2"]("cpu", str(INFO_2), str(tmp_path / "scores"))
        WARNINGS.clear()
        found = scorer.build_full_info_json(str(videos), dimension, [dimension])
        assert not WARNINGS
        entries = json.loads(Path(found).read_text())
        paths = [Path(path) for entry in entries for path in entry.get("video_list", ())]
        assert set(paths) == {tmp_path / "videos" / row.file for row in mine}
