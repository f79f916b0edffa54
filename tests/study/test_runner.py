"""The runner with a program in main.py's place that ends at once: what runs, when, and again."""

import json
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.study import record, runner
from qvgen_jax.study.grid import read_cells
from tests.study.records import cells, grid, run_lines

ROOT = Path(__file__).parents[2]
# Writes what a run leaves, unless its config says to fail or to wait for a signal.
PROGRAM = """
import json, pathlib, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv if "=" in word)
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
with open("calls.txt", "a") as file:
    file.write(f"{workdir} {given['--config.seed']}\\n")
if given.get("--config.train.truth_blend"):
    print("loading\\nerror: this cannot be")
    sys.exit(2)
workdir.mkdir(parents=True, exist_ok=True)
if given.get("--config.train.ema_decay"):
    def stop(*_):
        (workdir / "stopped").touch()
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    (workdir / "ready").touch()
    time.sleep(60)
lines = pathlib.Path("lines.jsonl").read_text()
(workdir / "metrics.jsonl").write_text(lines)
held_out = {"clips": 2, "mean": {"normalised": float("nan")}, "per_clip": [0.123456789, 0.2]}
(workdir / "held_out.json").write_text(json.dumps({"held_out": held_out}))
"""


class Study:
    """A study in a folder of its own, with the variants it is given."""

    def __init__(self, folder: Path, variants: dict):
        self.folder, self.study = folder, folder / "study"
        self.grid = grid(
            "smoke",
            base=str(ROOT / "configs/tiny_w4a4.py"),
            variants=variants,
            scratch=str(folder / "scratch"),
        )
        self.ended = 0

    def run(self, **changes) -> runner.Outcome:
        def on_end():
            self.ended += 1

        asked = {**self.grid, **changes}
        found = read_cells(asked, list(asked["variants"]))
        return runner.run_cells(asked, self.study, found, on_end, make_ready=lambda *_: None)

    def calls(self) -> int:
        path = self.folder / "calls.txt"
        return len(path.read_text().splitlines()) if path.is_file() else 0

    def record(self, name: str) -> dict:
        return json.loads((self.study / "smoke" / f"{name}.json").read_text())


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runner, "_POLL", 0.01)
    Path("main.py").write_text(PROGRAM)
    base = str(ROOT / "configs/tiny_w4a4.py")
    cell = cells("smoke", ("default",), base=base)[0]
    lines = run_lines(cell)
    Path("lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lambda **variants: Study(tmp_path, variants)


def test_only_what_is_missing_or_changed_runs_again(make, capsys):
    study = make(default={}, plain_qat={"quant.rank": 0}, rank_1={"quant.rank": 1})
    outcome = study.run()
    assert (len(outcome.done), len(outcome.kept), study.calls()) == (3, 0, 3)
    assert study.ended == 3
    assert "3 of 3 cells are done; about 0 min left" in capsys.readouterr().out

    assert len(study.run().kept) == 3
    assert study.calls() == 3

    (study.study / "smoke" / "plain_qat-w4a4-0.json").unlink()
    assert [cell.variant for cell in study.run().done] == ["plain_qat"]
    assert study.calls() == 4

    study.grid["variants"]["rank_1"] = {"quant.rank": 2, "quant.shrink": 4}
    capsys.readouterr()
    assert [cell.variant for cell in study.run().done] == ["rank_1"]
    assert "rank_1-w4a4-0 runs again: its config changed (quant.rank: 1 there, 2 here" in (
        capsys.readouterr().out
    )
    assert study.record("rank_1-w4a4-0")["config"]["quant.shrink"] == 4


def test_a_record_holds_command_curves_and_numbers_and_the_folder_is_gone(make):
    study = make(default={})
    study.run()
    found = study.record("default-w4a4-0")
    assert "python main.py --config" in found["command"]
    assert "--config.train.steps=6" in found["command"]
    assert "JAX_COMPILATION_CACHE_DIR=" in found["command"]
    assert found["curves"]["rank"][0] == 2
    assert found["curves"]["small_singular_share"][-1] is None
    assert found["held_out"]["per_clip"] == [0.12346, 0.2]
    assert found["held_out"]["mean"]["normalised"] is None  # NaN is no JSON.
    assert found["seconds_per_step"]["with_branch"] == 0.5  # Without the line that compiled.
    assert found["seconds_per_step"]["without_branch"] == 0.25
    assert found["code"] == {"commit": None, "dirty": None}  # Its folder is in no repository.
    assert found["cpus"] in (None, *range(1, 65))
    assert found["device"] == jax.devices()[0].device_kind
    assert not (study.folder / "scratch/smoke/default/w4a4/0").exists()

    study.grid["keep_cells"] = True
    (study.study / "smoke" / "default-w4a4-0.json").unlink()
    study.run()
    assert (study.folder / "scratch/smoke/default/w4a4/0/metrics.jsonl").is_file()


def test_a_failure_is_kept_with_its_last_lines_stops_nobody_and_is_tried_again(make, capsys):
    study = make(bad={"train.truth_blend": 1.0}, default={})
    outcome = study.run()
    assert [cell.variant for cell in outcome.failed] == ["bad"]
    assert [cell.variant for cell in outcome.done] == ["default"]
    failure = json.loads((study.study / "smoke" / "bad-w4a4-0.failed.json").read_text())
    assert failure["exit_code"] == 2
    assert failure["log"] == ["loading", "error: this cannot be"]
    assert "failed with exit code 2: error: this cannot be" in capsys.readouterr().out
    assert [path.name for path in (study.study / "smoke").glob("default*")] == [
        "default-w4a4-0.json"
    ]

    study.grid["variants"]["bad"] = {}
    assert [cell.variant for cell in study.run().done] == ["bad"]
    assert not (study.study / "smoke" / "bad-w4a4-0.failed.json").exists()


def test_a_run_that_leaves_no_metrics_has_failed(make):
    study = make(default={})
    Path("lines.jsonl").write_text("")
    outcome = study.run()
    assert [cell.variant for cell in outcome.failed] == ["default"]
    assert not (study.study / "smoke" / "default-w4a4-0.json").exists()


def test_ctrl_c_stops_the_cells_that_run_and_the_next_start_goes_on(make, monkeypatch):
    study = make(waits={"train.ema_decay": 0.5}, default={})
    folder = study.folder / "scratch/smoke/waits/w4a4/0"
    before = signal.getsignal(signal.SIGTERM)

    def sleep(_):
        time.sleep(0.01)
        if (folder / "ready").exists():
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runner, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
        with pytest.raises(KeyboardInterrupt):
            study.run(parallel=1)
    assert (folder / "stopped").exists()  # It was asked, and ended by itself.
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list((study.study).rglob("*.json"))

    study.grid["variants"]["waits"] = {}
    study.run()
    assert len(list((study.study / "smoke").glob("*.json"))) == 2


def test_what_another_config_left_in_a_cells_folder_is_deleted(make):
    study = make(default={})
    folder = study.folder / "scratch/smoke/default/w4a4/0"
    folder.mkdir(parents=True)
    (folder / "checkpoint").touch()
    same = read_cells(study.grid, ["default"])[0]
    (folder / "config.json").write_text(json.dumps(same.config))
    study.grid["keep_cells"] = True
    study.run()
    assert (folder / "checkpoint").exists()  # Its own: the run continues.

    (study.study / "smoke" / "default-w4a4-0.json").unlink()
    (folder / "config.json").write_text(json.dumps({**same.config, "seed": 9}))
    study.run()
    assert not (folder / "checkpoint").exists()


def test_two_starts_do_not_share_a_scratch_folder(make):
    study = make(default={})
    with (
        runner._alone(study.folder / "scratch"),
        pytest.raises(UserError, match="another start of a study is at work in"),
    ):
        study.run()
    assert len(study.run().done) == 1  # The lock went with its holder.


def test_a_record_says_whether_code_was_committed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").touch()
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "tables.md").touch()  # What the study itself writes.
    found = record.code_state()
    assert (len(found["commit"]), found["dirty"]) == (40, False)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "new.py").touch()
    assert record.code_state()["dirty"] is True


def test_cpus_are_divided_where_there_are_enough(monkeypatch):
    monkeypatch.setattr(runner.os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4}, raising=False)
    assert runner.cpu_groups(2) == [(0, 2, 4), (1, 3)]
    assert runner.cpu_groups(1) == [None]
    assert runner.cpu_groups(6) == [None] * 6


def test_curves_are_thinned_to_their_limit(monkeypatch):
    monkeypatch.setattr(record, "_CURVE_POINTS", 10)
    lines = run_lines(cells("smoke", ("default",))[0])
    found = record.curves(lines)
    assert len(found["step"]) == 10
    assert record.curve_records({"curves": found})[1]["step"] == found["step"][1]
