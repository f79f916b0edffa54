"""Answers of one variant, and their distances to full precision's: slice by slice, each on disk.

A slice is computed once, by whoever comes first, and is there completely or not at all: whatever
ends a process, the next one goes on, and several work side by side.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from qvgen_jax.data.video import write_video
from qvgen_jax.evaluation.asked import Asked
from qvgen_jax.evaluation.judge import judge, plain, strict
from qvgen_jax.evaluation.measures import consistency, motion, psnr, ssim
from qvgen_jax.evaluation.reference import save_arrays
from qvgen_jax.file_lock import locked
from qvgen_jax.pipeline import Pipeline

SCORES = ("plain", "strict", "shape", "colour", "direction")
_UNKNOWN = -1  # Bytes, where no device says them.

Slices = Mapping[str, Sequence[Asked]]


class Place(NamedTuple):
    """Where a variant's files are.

    Attributes:
        answers: folder of its slices.
        distances: folder of their distances to full precision; None for full precision itself.
        videos: folder of the videos to look at, everybody's.
    """

    answers: Path
    distances: Path | None
    videos: Path

    def video(self, number: int) -> Path:
        """The file of a video to look at."""
        return self.videos / f"{self.answers.name}-{number:03d}.mp4"

    def is_complete(self, name: str, numbers: Iterable[int] = ()) -> bool:
        """Whether a slice was answered and compared, and some videos were written."""
        folders = [self.answers, *([self.distances] if self.distances else [])]
        files = [*(folder / f"{name}.npz" for folder in folders), *map(self.video, numbers)]
        return all(path.is_file() for path in files)


def judge_all(videos: np.ndarray, asked: Sequence[Asked]) -> dict[str, np.ndarray]:
    """Booleans `[videos]` per score."""
    verdicts = [judge(video) for video in videos]
    pairs = [(verdict, each.wanted) for verdict, each in zip(verdicts, asked, strict=True)]
    return {
        "plain": np.array([plain(verdict, wanted) for verdict, wanted in pairs]),
        "strict": np.array([strict(verdict, wanted) for verdict, wanted in pairs]),
        "shape": np.array([verdict.shape == wanted.shape for verdict, wanted in pairs]),
        "colour": np.array([verdict.colour == wanted.colour for verdict, wanted in pairs]),
        "direction": np.array([verdict.direction == wanted.direction for verdict, wanted in pairs]),
    }


def peak_bytes() -> int:
    """The most that was in use on one of this process's devices so far; -1 where none says it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max(each.get("peak_bytes_in_use", _UNKNOWN) for each in stats)


def score(pipe: Pipeline, asked: Sequence[Asked], batch_size: int) -> dict[str, np.ndarray]:
    """Make the videos of one variant and look at them.

    Returns:
        `latents` `[videos, ...]`; `consistency` and `motion` `[videos]`, float64; the booleans of
        `judge_all` where the tiny world is asked for; and scalars: `seconds` per video,
        `peak_bytes`, -1 unless these videos took more than anything before in this process, and
        `device`.
    """
    before, start = peak_bytes(), time.perf_counter()
    latents = pipe.sample_latents(
        [each.prompt for each in asked],
        seeds=[each.seed for each in asked],
        batch_size=batch_size,
    )
    frames = pipe.to_frames(latents, batch_size=batch_size)
    seconds, peak = time.perf_counter() - start, peak_bytes()
    found = {
        "latents": latents,
        "seconds": np.float64(seconds / len(asked)),
        "peak_bytes": np.int64(peak if peak > before else _UNKNOWN),
        "device": np.str_(jax.local_devices()[0].device_kind),
        "consistency": np.array([consistency(video) for video in frames]),
        "motion": np.array([motion(video) for video in frames]),
    }
    return found | (judge_all(frames, asked) if asked[0].wanted else {})


def answer(load: Callable[[], Pipeline], folder: Path, slices: Slices, batch_size: int) -> None:
    """`score` of those slices that `folder` has not; `warm` marks those whose seconds count.

    The first one of a process compiles, and one that does not fill its batch works for nothing.
    """
    pipe = None
    for name, asked in slices.items():
        with locked(folder, name):
            if (folder / f"{name}.npz").is_file():
                continue
            warm = np.bool_(pipe is not None and len(asked) == batch_size)
            pipe = pipe or load()
            save_arrays(folder / f"{name}.npz", **score(pipe, asked, batch_size), warm=warm)
        print(f"{folder.name}: {name.partition('-')[0]} + {len(asked)}", flush=True)


def read(folder: Path, slices: Slices, leave: str = "") -> dict[str, np.ndarray]:
    """All slices behind one another; scalars become an array with a value per slice.

    Args:
        leave: an array that is not needed, and large.
    """
    parts = []
    for name in slices:
        with np.load(folder / f"{name}.npz") as arrays:
            parts.append({key: np.atleast_1d(arrays[key]) for key in arrays.files if key != leave})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def compare(
    load: Callable[[], Pipeline],
    places: Sequence[Place],
    slices: Slices,
    batch_size: int,
    shown: int,
    pixels: bool = True,
) -> None:
    """Distances of variants to full precision, `[videos]` each, for those slices without any.

    `psnr` and `ssim` of the videos, which are decoded again from the latents: a real model's take a
    hundred times their space. `gap`, the norm of the latents' difference, and `norm`, of full
    precision's latents. The first videos become files.

    Args:
        load: gives full precision's pipeline, whose autoencoder is everybody's; called if needed.
        places: of the variants, full precision first.
        slices: that are answered by all.
        batch_size: as they were answered with.
        shown: how many videos of each become files.
        pixels: whether `psnr` and `ssim` are wanted.
    """
    pipe = None
    for name, asked in slices.items():
        first = int(name.partition("-")[0])
        numbers = range(first, min(first + len(asked), shown))
        with locked(places[0].answers, f"{name}-compared"):
            if missing := [place for place in places if not place.is_complete(name, numbers)]:
                pipe = pipe or load()
                _compare(pipe, places[0], missing, name, batch_size, numbers, pixels)


def _compare(
    pipe: Pipeline,
    reference: Place,
    missing: Sequence[Place],
    name: str,
    batch_size: int,
    numbers: range,
    pixels: bool,
) -> None:
    """One slice of `compare`, of the places that miss something; `numbers` of videos to show."""
    theirs, frames = _latents(reference, name), None
    if pixels or numbers:
        frames = pipe.to_frames(theirs, batch_size=batch_size)
    for place in missing:
        ours, made = theirs, frames
        if place.distances:
            ours = _latents(place, name)
            made = frames if frames is None else pipe.to_frames(ours, batch_size=batch_size)
        for row, number in enumerate(numbers):
            _write(place.video(number), made[row], pipe.defaults["fps"])
        if place.distances:
            found = {"gap": _norms(ours - theirs), "norm": _norms(theirs)}
            if pixels:
                pairs = list(zip(made, frames, strict=True))
                found["psnr"] = np.array([psnr(*pair) for pair in pairs])
                found["ssim"] = np.array([ssim(*pair) for pair in pairs])
            place.distances.mkdir(parents=True, exist_ok=True)
            save_arrays(place.distances / f"{name}.npz", **found)


def _latents(place: Place, name: str) -> np.ndarray:
    with np.load(place.answers / f"{name}.npz") as arrays:
        return arrays["latents"]


def _norms(latents: np.ndarray) -> np.ndarray:
    return np.linalg.norm(latents.reshape(len(latents), -1).astype(np.float64), axis=1)


def _write(path: Path, frames: np.ndarray, fps: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part.mp4")
    write_video(partial, frames, fps)
    partial.replace(path)
