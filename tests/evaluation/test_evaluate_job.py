"""The job on real pipelines of the smallest sizes and their real exports."""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import qvgen_jax
from configs.tiny_w4a4 import get_config
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.evaluate_job import parse_exports, run_evaluate
from qvgen_jax.evaluation.measures import psnr
from tests.cpu_devices import ON_CPU
from tests.evaluation.small_pipelines import write_export, write_full
from tests.evaluation.test_evaluate import without_times
from tests.test_pipeline import TRANSFORMER

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The folders of full precision and of its export in 4 bits."""
    base = tmp_path_factory.mktemp("models")
    full = write_full(base / "full")
    return {"full": full, 4: write_export(full, base / "w4", 4)}


def settings(models, **evaluate) -> dict:
    config = get_config()
    config.model = str(models["full"])
    config.sample.batch_size = 2
    config.evaluate.update({"videos": 5, "shown": 2, "round_to_nearest": False} | evaluate)
    return config.to_dict()


def exports(models, *bits) -> list[str]:
    return [f"W{each}={models[each]}" for each in bits]


@pytest.fixture(scope="module")
def compared(models, tmp_path_factory):
    """The workdir of a comparison that ran through."""
    workdir = tmp_path_factory.mktemp("compared")
    text = run_evaluate(settings(models), workdir, exports(models, 4))
    assert text + "\n" == (workdir / "evaluation.md").read_text()
    return workdir


def result(workdir: Path) -> dict:
    return json.loads((workdir / "evaluation.json").read_text())


def files(workdir: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in workdir.rglob("*.npz")}


@pytest.mark.slow
def test_the_measures_are_those_of_what_the_loaded_pipelines_generate(models, compared):
    videos = json.loads((compared / "evaluation" / "videos.json").read_text())
    asked = [row["prompt"] for row in videos], [row["seed"] for row in videos]
    full, packed = (
        qvgen_jax.load(models[each]).generate(asked[0], seeds=asked[1], batch_size=2)
        for each in ("full", 4)
    )
    folder = next((compared / "evaluation").glob("w4-*-against-*"))
    with np.load(min(folder.glob("00000-*.npz"))) as found:
        expected = [psnr(*pair) for pair in zip(packed, full, strict=True)]
        # The same programs on the same batch.
        np.testing.assert_allclose(found["psnr"], expected, atol=1e-9)


@pytest.mark.slow
def test_an_export_that_is_round_to_nearest_is_as_far_from_full_precision_as_its_simulation(
    models, compared, tmp_path
):
    workdir = shutil.copytree(compared, tmp_path / "run")
    run_evaluate(settings(models, round_to_nearest=True), workdir, exports(models, 4))
    rows = result(workdir)["variants"]
    assert [row["name"] for row in rows] == ["Full precision", "Round-to-nearest W4A4", "W4"]
    assert rows[1]["latent_difference"] > 0.01
    # Integers against a simulation in float: nearly the same latents, and never quite.
    assert rows[2]["latent_difference"] == pytest.approx(rows[1]["latent_difference"], rel=0.05)


@pytest.mark.slow
def test_what_a_variant_holds_and_how_long_it_takes_is_told(compared):
    full, packed = (row["speed"] for row in result(compared)["variants"])
    assert packed["weights_bytes"] < full["weights_bytes"]
    assert full["ratio_to_reference"] == 1
    assert packed["seconds_per_video"] > 0
    assert full["peak_bytes"] is packed["peak_bytes"] is None  # A CPU does not say.


@pytest.mark.slow
def test_one_export_more_computes_only_that_one(models, compared, tmp_path):
    workdir = shutil.copytree(compared, tmp_path / "more")
    models = {**models, 3: write_export(models["full"], tmp_path / "w3", 3)}
    before, rows = files(workdir), result(workdir)["variants"]
    run_evaluate(settings(models), workdir, exports(models, 4, 3))
    after = files(workdir)
    assert {path: after[path] for path in before} == before
    new = {path.parent.name.split("-")[0] for path in set(after) - set(before)}
    assert new == {"w3"}
    assert result(workdir)["variants"][:2] == rows
    assert not (workdir / "report").exists()


@pytest.mark.slow
def test_in_the_workdir_of_a_run_its_report_is_written_if_its_export_is_compared(
    models, compared, tmp_path
):
    workdir = shutil.copytree(compared, tmp_path / "run")
    (workdir / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    own = shutil.copytree(models[4], workdir / "export")
    before = files(workdir)
    run_evaluate(settings(models), workdir, [f"W4={own}"])
    assert files(workdir) == before  # The same model wherever it lies.
    assert "W4" in (workdir / "report" / "index.html").read_text()
    (workdir / "evaluation.json").unlink()
    with pytest.raises(UserError, match="would show the others' numbers"):
        run_evaluate(settings(models), workdir, exports(models, 4))


def test_prompts_of_a_file_are_compared_without_the_judge(models, tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog runs\na cat sleeps\n")
    config = settings(models, videos=3)
    config["sample"]["prompts"] = str(tmp_path / "prompts.txt")
    text = run_evaluate(config, tmp_path, exports(models, 4))
    found = result(tmp_path)
    assert "strict" not in found["variants"][0]
    assert "seed" not in found
    assert found["variants"][1]["metrics"]["ssim"]["mean"] < 1
    assert "strict" not in text


def test_an_export_of_another_model_is_refused_by_name_before_anything_is_computed(
    models, tmp_path
):
    deeper = dataclasses.replace(TRANSFORMER, num_layers=3)
    others = {
        "Alien was made from another pipeline": {"seed": 1},
        "Alien makes videos of num_frames 9, full precision of 5": {"num_frames": 9},
        "Alien is another transformer: num_layers 3 where full precision has 2": {
            "transformer": deeper
        },
    }
    for index, (message, changes) in enumerate(others.items()):
        alien = write_full(tmp_path / f"other{index}", **changes)
        both = [*exports(models, 4), f"Alien={alien}"]
        with pytest.raises(UserError, match=message):
            run_evaluate(settings(models), tmp_path / "run", both)
    with pytest.raises(UserError, match="nowhere is not a folder"):
        run_evaluate(settings(models), tmp_path / "run", [f"Alien={tmp_path / 'nowhere'}"])
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["runs/a/export"], "expected NAME=FOLDER"),
        (["A="], "expected NAME=FOLDER"),
        (["=b"], "expected NAME=FOLDER"),
        (["A|B=b"], "no |"),
        (["---=b"], "a letter or digit"),
        (["A=b", "A=c"], "there is a 'A' already"),
        (["Full precision=b"], "there is a 'Full precision' already"),
    ],
)
def test_names_and_folders_are_told_apart(given, message):
    assert parse_exports(["A = b=c"]) == {"A": "b=c"}
    with pytest.raises(UserError) as told:
        parse_exports(given, ["Full precision"])
    assert message in str(told.value)


def start(models, workdir: Path, *arguments: str, environment: dict | None = None):
    flags = {
        "model": models["full"],
        "sample.batch_size": 2,
        "evaluate.videos": 5,
        "evaluate.shown": 2,
        "evaluate.round_to_nearest": False,
    }
    return subprocess.Popen(
        [
            *(sys.executable, "main.py", "--config", "configs/tiny_w4a4.py", "--job", "evaluate"),
            *(f"--config.{key}={value}" for key, value in flags.items()),
            *("--workdir", str(workdir), *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, **ON_CPU, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_wrong_argument_gets_one_message(models, tmp_path):
    process = start(models, tmp_path / "run", "--export", "W4")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "expected NAME=FOLDER" in errors
    assert len(errors.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_nothing_to_compare_and_a_part_that_is_none_are_told(models, tmp_path):
    with pytest.raises(UserError, match="nothing to compare"):
        run_evaluate(settings(models, videos=0), tmp_path, exports(models, 4))
    with pytest.raises(UserError, match="expected i/n"):
        run_evaluate(settings(models), tmp_path, exports(models, 4), part="2/2")


@pytest.mark.slow
def test_a_killed_comparison_goes_on_to_the_same_file(models, compared, tmp_path):
    process = start(models, tmp_path, "--export", f"W4={models[4]}")
    deadline = time.monotonic() + 300
    while not files(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "evaluation.json").exists()
    again = start(models, tmp_path, "--export", f"W4={models[4]}")
    assert again.communicate()[1] == ""
    assert without_times(result(tmp_path)) == without_times(result(compared))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.by_hand
def test_processes_of_one_run_share_the_work(models, compared, tmp_path):
    there = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    both = [
        start(
            models,
            tmp_path,
            *("--export", f"W4={models[4]}"),
            environment={**there, "JAX_PROCESS_ID": str(index)},
        )
        for index in range(2)
    ]
    outputs = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0]
    # Each answered some slices of both variants: three slices, two and one.
    assert [text.count(" + ") for text, _ in outputs] == [4, 2]
    mine, theirs = (
        [leaf for leaf in jax.tree.leaves(without_times(result(each))) if isinstance(leaf, float)]
        for each in (tmp_path, compared)
    )
    # A process among several computes other last bits than one alone: here and there a level, which
    # at 63 dB is a few thousandths of them.
    np.testing.assert_allclose(mine, theirs, atol=0.01)
