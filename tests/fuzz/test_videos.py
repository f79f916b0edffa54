"""Mutated videos: refused, or read as a video of the original's size; no crash in C, no hang."""

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path

import pytest

from qvgen_jax.errors import UserError
from tests.fuzz.campaign import count, generators, tried
from tests.fuzz.mutations import mutated_bytes

ROOT = Path(__file__).parents[2]
SECONDS = 30  # Of one file of 5 kB, on a busy machine, too.
CLIPS = [path.read_bytes() for path in sorted((ROOT / "assets/clips").glob("*.mp4"))[:8]]
BOXES = (b"moov", b"trak", b"mdia", b"stbl", b"stsd", b"avcC", b"stts", b"stsz", b"stco", b"elst")


class Reader:
    """A process that reads videos, and is begun again when it dies."""

    def __init__(self):
        self.process = None

    def read(self, path: Path) -> dict:
        if self.process is None:
            command = [sys.executable, "-m", "tests.fuzz.read_each"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.process.stdin.write(f"{path}\n")
        self.process.stdin.flush()
        if select.select([self.process.stdout], [], [], SECONDS)[0]:
            line = self.process.stdout.readline()
            if line:
                return json.loads(line)
        code = self.end()
        return {"crashed": f"no answer within {SECONDS} s, or exit code {code}"}

    def end(self) -> int:
        self.process.kill()
        code = self.process.wait()
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        return code


@pytest.fixture(scope="module")
def reader():
    reader = Reader()
    yield reader
    if reader.process:
        reader.end()


def mutated(data: bytes, rng) -> bytes:
    """Anywhere, or in a box of the header, where sizes and counts are."""
    places = [data.find(box) for box in BOXES if box in data]
    if rng.random() < 0.5:
        return mutated_bytes(data, rng)
    place = rng.choice(places)
    return data[:place] + mutated_bytes(data[place : place + 40], rng) + data[place + 40 :]


def test_a_mutated_video_is_refused_or_shows_what_the_original_does(tmp_path, reader):
    originals, altered = [], 0
    for index, clip in enumerate(CLIPS):
        (tmp_path / f"{index}.mp4").write_bytes(clip)
        originals.append(reader.read(tmp_path / f"{index}.mp4"))
    for label, rng in generators("videos", 10):
        which = rng.randrange(len(CLIPS))
        path = tmp_path / "mutated.mp4"
        path.write_bytes(mutated(CLIPS[which], rng))
        with tried("videos"):
            found = reader.read(path)
            if "refused" in found:
                raise UserError(found["refused"])
            assert "shape" in found, f"{label}: {found['crashed']}"
            assert found["shape"][1:] == originals[which]["shape"][1:], label
            altered += not set(found["frames"]) <= set(originals[which]["frames"])
    # H.264 has no checksum: some changed bits are another valid video of the same size.
    assert altered <= 1 + 0.01 * count(10)
