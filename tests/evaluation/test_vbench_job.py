"""The job around the tree: the package found, its scores asked for, the work shared."""

import json
import sys

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import vbench, vbench_job
from qvgen_jax.evaluation.vbench_job import find_info, run_vbench
from tests.evaluation.test_vbench import INFO, Painter

CONFIG = {
    "model": "somewhere",
    "text_weights": "float",
    "kernels": "auto",
    "sample": {"batch_size": 4},
    "evaluate": {"seed": 1},
}
# A package of the real one's shape whose scores are the number of videos that it sees, by 100.
PACKAGE = """
import json, os

class VBench:
    def __init__(self, device, info, out):
        self.out = out
        os.makedirs(out, exist_ok=True)

    def evaluate(self, videos_path, name, dimension_list):
        count = len(os.listdir(videos_path))
        with open(f"{self.out}/{name}_eval_results.json", "w") as file:
            json.dump({dimension: [count / 100, []] for dimension in dimension_list}, file)
"""
TORCH = "class cuda:\n    is_available = staticmethod(lambda: False)\ndevice = str\n"


@pytest.fixture
def python(tmp_path):
    """An environment of its own with a package vbench."""
    site = tmp_path / "site"
    (site / "vbench").mkdir(parents=True)
    (site / "vbench/__init__.py").write_text(PACKAGE)
    (site / "vbench/VBench_full_info.json").write_text(json.dumps(INFO))
    (site / "torch.py").write_text(TORCH)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {sys.executable} -S "$@"\n')
    path.chmod(0o755)
    return str(path)


@pytest.fixture(autouse=True)
def a_painter(monkeypatch):
    monkeypatch.setattr(vbench_job, "load_to_generate", lambda *_, **__: Painter())
    monkeypatch.setattr(vbench, "made_by", lambda pipe: str(pipe.defaults))


def test_what_is_complete_is_scored_by_the_package_in_its_own_environment(python, tmp_path):
    run = tmp_path / "run"
    text = run_vbench(CONFIG, run, python=python, part="1/2")
    assert text.splitlines()[2].count("not scored") == 8
    text = run_vbench(CONFIG, run, python=python, part="0/2")
    ours = text.splitlines()[2].split(" | ")
    # Three prompts of overall consistency, one of each other folder, five videos each.
    assert ours == [
        "| full-precision",
        *["15.00", "15.00", "5.00", "5.00", "5.00", "5.00", "5.00"],
        "15.00 |",
    ]
    assert (run / "vbench/table.md").read_text() == text + "\n"
    (run / "export").mkdir()
    (run / "export/model_index.json").write_text("{}")
    assert run_vbench(CONFIG, run, python=python).splitlines()[3].startswith("| export | 15.00")


def test_a_smoke_tree_is_apart(python, tmp_path):
    run_vbench(CONFIG, tmp_path / "run", python=python, smoke=True)
    run_vbench(CONFIG, tmp_path / "run", python=python, dimensions="scene")
    counts = [
        len(list((tmp_path / "run" / name).rglob("*.mp4"))) for name in ("vbench_smoke", "vbench")
    ]
    assert counts == [8, 5]


def test_vbench_2_has_a_package_and_a_tree_of_its_own(python, tmp_path):
    site = tmp_path / "site/vbench2"
    site.mkdir()
    (site / "__init__.py").write_text(PACKAGE.replace("class VBench:", "class VBench2:"))
    rows = [{"prompt_en": f"a {name}", "dimension": [name]} for name in ("Diversity", "Material")]
    (site / "VBench2_full_info.json").write_text(json.dumps(rows))
    text = run_vbench(CONFIG, tmp_path / "run", python=python, second=True)
    assert text.splitlines()[0] == "| | Diversity | Material |"
    assert text.splitlines()[2:] == ["| full-precision | 20.00 | 3.00 |"]
    assert (tmp_path / "run/vbench2/full-precision/videos/Material/a Material-2.mp4").is_file()


def test_a_package_that_is_not_there_is_told(python, tmp_path):
    (tmp_path / "site/vbench/__init__.py").unlink()  # A folder of that name is no package.
    with pytest.raises(UserError, match=r"no vbench package for .*python: install it"):
        find_info("", python)
    assert str(find_info("a.json", python)) == "a.json"
    with pytest.raises(UserError, match="nowhere does not start"):
        find_info("", str(tmp_path / "nowhere"))


def test_a_package_that_fails_is_told_with_its_last_line(python, tmp_path):
    (tmp_path / "site/torch.py").write_text("raise ImportError('no torch for this machine')")
    with pytest.raises(UserError, match="ended with 1: ImportError: no torch for this machine"):
        run_vbench(CONFIG, tmp_path / "run", python=python)
