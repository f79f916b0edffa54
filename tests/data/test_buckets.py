"""Videos of several sizes and lengths: encoded into buckets, loaded one bucket per batch."""

import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qvgen_jax.data.clips import Cut, Size
from qvgen_jax.data.dataset import EncodedDataset, Turns, batches, steps_by_shape
from qvgen_jax.data.encode import encode_folder
from qvgen_jax.data.video import write_video
from tests.data.test_encoded_dataset import AveragingPipeline

ROOT = Path(__file__).parents[2]
WIDE, TALL, SHORT = Size(9, 16, 32), Size(9, 32, 16), Size(5, 16, 32)
CUT = Cut((WIDE, TALL, SHORT), 8.0, 2, "random")


def write_videos(folder: Path) -> Path:
    """Four long wide videos, two tall ones, three short ones, one that is too short for all."""
    rng, lines = np.random.default_rng(0), []
    shapes = [(20, 48, 96)] * 4 + [(10, 64, 40)] * 2 + [(6, 32, 64)] * 3 + [(3, 32, 64)]
    for index, shape in enumerate(shapes):
        name = f"{index}.mp4"
        write_video(folder / name, rng.integers(0, 255, (*shape, 3), np.uint8), 8)
        lines.append(json.dumps({"file": name, "caption": f"video {'very ' * index}{index}"}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    return write_videos(tmp_path_factory.mktemp("videos"))


@pytest.fixture(scope="module")
def encoded(videos, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    encode_folder(AveragingPipeline(), videos, out, cut=CUT, shard_size=4, batch_size=2)
    return EncodedDataset(out)


def test_every_video_gives_its_clips_to_the_bucket_that_fits(encoded):
    assert {size: len(place) for size, place in encoded.buckets.items()} == {
        WIDE: 8,
        TALL: 2,
        SHORT: 3,
    }
    of_wide = [encoded[index] for index in encoded.buckets[WIDE]]
    assert Counter(clip["source"] for clip in of_wide) == {f"{i}.mp4": 2 for i in range(4)}
    assert {clip["seconds"] for clip in of_wide} == {"0.000", "1.250"}
    assert {clip["latent_mean"].shape for clip in of_wide} == {(3, 2, 4, 3)}
    assert list(encoded.manifest["refused"]) == ["9.mp4"]
    reason = "3 frames, 0.25 s, needed are 5 at 8 a second, 0.62 s: use longer videos"
    assert reason in encoded.manifest["refused"]["9.mp4"]
    assert encoded.manifest["versions"]["av"]


def test_a_batch_has_one_size_and_an_epoch_all_clips(encoded):
    assert steps_by_shape(encoded, 2) == {(3, 2, 4, 3): 4, (3, 4, 2, 3): 1, (2, 2, 4, 3): 2}
    epoch = list(itertools.islice(batches(encoded, seed=3, batch_size=2, captions=True), 7))
    shapes = Counter(batch["latent_mean"].shape[1:] for batch in epoch)
    assert shapes == steps_by_shape(encoded, 2)
    seen = Counter(caption for batch in epoch for caption in batch["caption"])
    assert len(seen) == 9
    numbers = np.concatenate([batch["sample_index"] for batch in epoch])
    assert numbers.tolist() == list(range(14))


def test_resuming_and_sharing_give_the_same_batches(encoded):
    whole = list(itertools.islice(batches(encoded, seed=5, batch_size=3), 12))
    resumed = batches(encoded, seed=5, batch_size=3, start_step=7)
    shares = [
        list(itertools.islice(batches(encoded, seed=5, batch_size=3, rows=rows), 12))
        for rows in ([2], [0, 1])
    ]
    for step, batch in enumerate(whole):
        again = [next(resumed)] if step >= 7 else []
        last, rest = (share[step] for share in shares)
        together = {name: np.concatenate([rest[name], last[name]]) for name in batch}
        for other in (*again, together):
            for name, value in batch.items():
                np.testing.assert_array_equal(other[name], value)


def test_every_batch_of_a_bucket_comes_in_its_turn():
    turns = Turns([5, 1, 12], batch_size=4, seed=0)
    assert turns.batches == [2, 1, 3]
    found = [turns(step) for step in range(60)]
    for bucket in range(3):
        mine = [turn for which, turn in found if which == bucket]
        assert mine == list(range(10 * turns.batches[bucket]))
    first, second = ([which for which, _ in found[at : at + 6]] for at in (0, 6))
    assert sorted(first) == sorted(second) == [0, 0, 1, 2, 2, 2]
    orders = {tuple(which for which, _ in found[at : at + 6]) for at in range(0, 60, 6)}
    assert len(orders) > 5


def test_a_captions_file_alone_names_the_videos(videos, tmp_path):
    source = shutil.copytree(videos, tmp_path / "videos")
    (source / "some.csv").write_text("path,caption\n4.mp4,tall\n0.mp4,wide\n")
    out = tmp_path / "encoded"
    encode_folder(AveragingPipeline(), source / "some.csv", out, cut=CUT, batch_size=1)
    assert len(EncodedDataset(out)) == 3


def test_how_far_it_is_is_told_with_speed_and_size(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("qvgen_jax.data.encode._SECONDS_QUIET", 0)
    told = []
    encode_folder(AveragingPipeline(), videos, tmp_path, cut=CUT, batch_size=2, log=told.append)
    assert told[0].startswith("encoded 2 of 10 videos, 4 clips (")
    assert told[0].endswith("min left")
    assert " s a video, 0.00" in told[0]
    assert any(line.startswith("encoded 10 of 10 videos, 13 clips") for line in told)


KILLED = """
import sys
import time
from pathlib import Path
from qvgen_jax.data.encode import encode_folder
from tests.data.test_buckets import CUT, AveragingPipeline
from qvgen_jax import hosts
hosts.join()
print("begins", flush=True)
start = time.monotonic()
encode_folder(AveragingPipeline(), Path(sys.argv[1]), Path(sys.argv[2]), cut=CUT, shard_size=2,
              batch_size=1)
print(time.monotonic() - start)
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".part"}


@pytest.mark.parametrize(
    "times", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.by_hand)]
)
def test_encoding_that_is_killed_ends_with_the_same_bytes(videos, tmp_path, times):
    """At random moments of the work; a pass that came to its end begins anew."""
    whole, out, seed = tmp_path / "whole", tmp_path / "killed", os.getpid()
    seconds, rng, places = encode_apart(videos, whole), random.Random(seed), Counter()
    while places.total() < times:
        # The first in the middle of a shard, the others anywhere.
        moment = rng.uniform(0, seconds) if places.total() else None
        if encode_apart(videos, out, moment, in_a_shard=not places.total()) is None:
            places[len(list(out.glob("clips-*.json"))), any(out.glob("*.part"))] += 1
        else:
            assert contents(out) == contents(whole)
            shutil.rmtree(out)
    encode_apart(videos, out)
    assert any(middle for _, middle in places)
    print(f"seed {seed}, (finished shards, in the middle of one): times: {dict(places)}")
    assert contents(out) == contents(whole)


def encode_apart(
    videos: Path, out: Path, killed_after: float | None = None, in_a_shard: bool = False
) -> float | None:
    """Encode in a process of its own; seconds of its work, None if it was killed in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(videos), str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "begins\n"
    if in_a_shard:
        while process.poll() is None and not any(out.glob("*x*.part")):
            time.sleep(0.001)
        killed_after = 0
    try:
        told, _ = process.communicate(timeout=killed_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None
    assert process.returncode == 0
    return float(told.split()[-1])


@pytest.mark.slow
def test_two_processes_share_the_work_on_one_disk(videos, tmp_path):
    encode_apart(videos, tmp_path / "whole")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out = tmp_path / "shared"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", KILLED, str(videos), str(out)],
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(index),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    # Of five shards of two videos, the first has three.
    assert "encoded 6 of 6 videos" in told[0]
    assert "encoded 4 of 4 videos" in told[1]
    assert contents(out) == contents(tmp_path / "whole")


SIDE_BY_SIDE = """
import sys
import time
from pathlib import Path
from qvgen_jax.data.encode import encode_folder
from tests.data.test_buckets import CUT, AveragingPipeline

class WaitingPipeline(AveragingPipeline):
    def vae_posterior(self, video):
        print("encodes", flush=True)
        while not Path(sys.argv[3]).exists():
            time.sleep(0.01)
        return super().vae_posterior(video)

encode_folder(WaitingPipeline(), Path(sys.argv[1]), Path(sys.argv[2]), cut=CUT, batch_size=1)
"""


def test_of_two_runs_that_encode_to_one_folder_the_second_waits_for_the_first(videos, tmp_path):
    """As two trainings do that are started on the same videos."""
    out, go_on = tmp_path / "shared", tmp_path / "go_on"

    def begun() -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-c", SIDE_BY_SIDE, str(videos), str(out), str(go_on)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )

    first = begun()
    assert first.stdout.readline() == "encodes\n"
    second = begun()
    waits = f"another run is at work on {out / '.clips-00000.lock'}: waiting for it\n"
    assert second.stdout.readline() == waits
    go_on.touch()
    assert "encoded 10 of 10 videos" in first.communicate(timeout=60)[0]
    assert second.communicate(timeout=60)[0] == ""  # Nothing was left to encode.
    assert (first.returncode, second.returncode) == (0, 0)
    encode_folder(AveragingPipeline(), videos, tmp_path / "alone", cut=CUT, batch_size=1)
    assert contents(out) == contents(tmp_path / "alone")
