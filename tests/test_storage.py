"""Runs in a bucket: what is copied there and back, and a run that moves to another machine."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.local import LocalFileSystem

from qvgen_jax import storage
from qvgen_jax.data.prepare import check_source
from qvgen_jax.errors import UserError

ROOT = Path(__file__).parents[1]


class FolderAsBuckets(LocalFileSystem):
    """`gs://bucket/name` is `FOLDER/bucket/name`."""

    protocol = "gs"
    cachable = False
    folder = ""

    @classmethod
    def _strip_protocol(cls, path):
        path = os.fspath(path)
        if path.startswith("gs://"):
            path = f"{cls.folder}/{path.removeprefix('gs://')}"
        return path.rstrip("/")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that `gs://runs` is."""
    monkeypatch.setattr(FolderAsBuckets, "folder", str(tmp_path / "buckets"))
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda *_: FolderAsBuckets())
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "machine"))
    (tmp_path / "buckets/runs").mkdir(parents=True)
    return tmp_path / "buckets/runs"


def another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path / "another"))


def test_a_folder_is_worked_in_as_it_is(tmp_path):
    assert storage.workdir(str(tmp_path)) == storage.local(tmp_path) == tmp_path
    assert storage.checkpoints(tmp_path) == epath.Path(tmp_path / "checkpoints")
    storage.push(tmp_path, last=True)
    assert not list(tmp_path.iterdir())


def test_files_go_to_the_bucket_once_and_come_to_another_machine(bucket, tmp_path, monkeypatch):
    here = storage.workdir("gs://runs/one")
    assert str(storage.checkpoints(here)) == "gs://runs/one/checkpoints"
    (here / "tensorboard").mkdir()
    (here / "tensorboard/events").write_bytes(b"1")
    (here / "metrics.jsonl").write_text("a\n")
    (here / "checkpoints/7").mkdir(parents=True)
    (here / "checkpoints/7/data").write_text("orbax writes these itself")
    (here / "config.tmp").write_text("half")
    storage.push(here)
    found = {str(p.relative_to(bucket / "one")) for p in bucket.rglob("*") if p.is_file()}
    assert found == {"metrics.jsonl", "tensorboard/events"}
    (bucket / "one/tensorboard/events").unlink()
    (here / "metrics.jsonl").write_text("a\nb\n")
    storage.push(here, last=True)
    assert (bucket / "one/metrics.jsonl").read_text() == "a\nb\n"
    assert not (bucket / "one/tensorboard/events").exists()  # Had been pushed, and not changed.

    (bucket / "one/checkpoints").mkdir()
    (bucket / "one/checkpoints/large").write_text("stays there")
    another_machine(monkeypatch, tmp_path)
    there = storage.workdir("gs://runs/one")
    assert there != here
    assert (there / "metrics.jsonl").read_text() == "a\nb\n"
    assert not (there / "checkpoints").exists()


def test_what_was_not_pushed_yet_stays_and_what_another_machine_wrote_comes(bucket, tmp_path):
    here = storage.workdir("gs://runs/one")
    (here / "metrics.jsonl").write_text("a\n")
    storage.push(here)
    (here / "metrics.jsonl").write_text("a\nunsent\n")
    storage.workdir("gs://runs/one")
    assert (here / "metrics.jsonl").read_text() == "a\nunsent\n"
    (bucket / "one/metrics.jsonl").write_text("written elsewhere, later\n")
    later = time.time() + 10
    os.utime(bucket / "one/metrics.jsonl", (later, later))
    storage.workdir("gs://runs/one")
    assert (here / "metrics.jsonl").read_text() == "written elsewhere, later\n"


def test_data_are_copied_before_they_are_read_and_an_empty_address_is_told(bucket):
    (bucket / "videos/deep").mkdir(parents=True)
    (bucket / "videos/checkpoints").mkdir()  # Apart in a workdir alone.
    (bucket / "videos/checkpoints/1.mp4").write_bytes(b"another")
    (bucket / "videos/captions.jsonl").write_text("{}")
    (bucket / "videos/deep/0.mp4").write_bytes(b"video")
    folder = storage.local("gs://runs/videos")
    assert (folder / "deep/0.mp4").read_bytes() == b"video"
    assert (folder / "checkpoints/1.mp4").read_bytes() == b"another"
    shutil.rmtree(bucket / "videos")
    assert storage.local("gs://runs/videos") == folder  # Asked for once in a process.
    (bucket / "videos").mkdir()
    data = {"source": "gs://runs/videos", "encoded": "", "on_the_fly": False}
    check_source({"data": data}, folder)
    with pytest.raises(UserError, match=r"gs://runs/nothing is empty or does not exist"):
        storage.local("gs://runs/nothing")
    with pytest.raises(UserError, match=r"holds no finished encoding, .* leave config"):
        check_source({"data": {**data, "encoded": "gs://runs/videos"}}, folder)


def test_a_bucket_that_does_not_answer_is_a_warning_and_in_the_end_an_error(
    bucket, monkeypatch, capsys
):
    here = storage.workdir("gs://runs/one")
    (here / "metrics.jsonl").write_text("a\n")

    def refuse(*arguments, **options):
        raise OSError("503 Service Unavailable")

    monkeypatch.setattr(FolderAsBuckets, "open", refuse)
    monkeypatch.setattr(FolderAsBuckets, "_open", refuse)
    storage.push(here)
    assert "warning: gs://runs/one cannot be reached (OSError: 503" in capsys.readouterr().err
    with pytest.raises(UserError, match=f"503 .*until then what is new is in {here}"):
        storage.push(here, last=True)


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("QVGEN_CACHE", str(tmp_path))

    def missing(*arguments):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(storage, "_remote_files", missing)
    with pytest.raises(UserError, match="s3://runs/one needs s3fs: pip install s3fs"):
        storage.workdir("s3://runs/one")


# Cloud Storage says of every object which generation it is; the emulator does not.
EMULATOR = """
import sys, time
from gcp_storage_emulator.handlers import objects
download = objects.download
def told(request, response, storage, *arguments, **options):
    download(request, response, storage, *arguments, **options)
    names = request.params["bucket_name"], request.params["object_id"]
    try:
        response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]
    except Exception:
        pass  # There is none, as was answered.
objects.download = told
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", int(sys.argv[1]), in_memory=True, default_bucket="qvgen-runs").start()
time.sleep(3600)
"""


@pytest.fixture
def emulator(tmp_path):
    """The environment in which `gs://qvgen-runs` is a bucket of this machine."""
    pytest.importorskip("gcsfs")
    pytest.importorskip("gcp_storage_emulator")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (tmp_path / "emulator.log").open("w") as log:
        server = subprocess.Popen(
            [sys.executable, "-c", EMULATOR, str(port)], stdout=log, stderr=subprocess.STDOUT
        )
    address = f"http://127.0.0.1:{port}"
    for _ in range(100):
        try:
            urllib.request.urlopen(f"{address}/storage/v1/b/qvgen-runs", timeout=1)
            break
        except OSError:
            time.sleep(0.2)
    yield {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GOOGLE_CLOUD_PROJECT": "qvgen",
    }
    server.terminate()


@pytest.mark.slow
def test_a_run_in_a_bucket_goes_on_on_another_machine_with_the_same_numbers(emulator, tmp_path):
    small = ["train.batch_size=2", "train.steps=4", "train.warmup_steps=1", "quant.rank=2"]
    small += ["train.checkpoint_every=2", "train.log_every=1", "sample.count=0"]
    flags = [f"--config.{each}" for each in (*small, "evaluate.videos=0")]

    def run(machine: str, workdir: str, steps: int) -> subprocess.CompletedProcess:
        command = ["--config", "configs/tiny_w4a4.py", *flags, "--workdir", workdir]
        return subprocess.run(
            [sys.executable, "-c", LIMITED, str(steps), *command],
            env={**os.environ, **emulator, "QVGEN_CACHE": str(tmp_path / machine)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )

    address = "gs://qvgen-runs/tiny"
    first = run("one", address, 3)
    assert first.returncode == 130, first.stderr[-2000:]
    second = run("two", address, 99)
    assert second.returncode == 0, second.stderr[-2000:]
    whole = run("three", str(tmp_path / "whole"), 99)
    assert whole.returncode == 0, whole.stderr[-2000:]
    found = [losses(folder) for folder in (*tmp_path.glob("two/*tiny*"), tmp_path / "whole")]
    assert len(found[0]) == 4
    assert found[0] == found[1]


def losses(workdir: Path) -> list[float]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


# main.py, interrupted before the update of the step that is given.
LIMITED = """
import sys
most = int(sys.argv.pop(1))
import main
from qvgen_jax.training import loop
enter = loop.enter_step
def limited(state, step, *arguments):
    if step == most:
        raise KeyboardInterrupt
    return enter(state, step, *arguments)
loop.enter_step = limited
sys.exit(main.main(["main.py", *sys.argv[1:]]))
"""
