"""Clips of video files: planned by a look at each file, read when they are wanted."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qvgen_jax.data.captions import CaptionedFile
from qvgen_jax.data.clips import Cut, Size, best_size, clips_of, corner
from qvgen_jax.data.video import MOST_BYTES, Survey, read_frames, survey_video
from qvgen_jax.errors import UserError


class Clip(NamedTuple):
    """One of a video, before it is encoded.

    Attributes:
        entry: its video and caption.
        size: its bucket.
        pixels: uint8 `[frames, height, width, 3]`.
        seconds: where it begins in the video.
    """

    entry: CaptionedFile
    size: Size
    pixels: np.ndarray
    seconds: float


class Plan(NamedTuple):
    """The clips of a video.

    Attributes:
        entry: the video and its caption.
        survey: of the file.
        size: of all its clips.
        frames: which frames each clip shows, as indices.
    """

    entry: CaptionedFile
    survey: Survey
    size: Size
    frames: list[np.ndarray]


def plan_clips(folder: Path, entry: CaptionedFile, cut: Cut) -> Plan | UserError:
    """Which clips a video gives, or the reason why there are none."""
    path = folder / entry.file
    try:
        survey = survey_video(path)
    except UserError as error:
        return error
    lengths = [size.frames for size in cut.sizes]
    long = [n for n in lengths if clips_of(survey.times, n, cut.fps, 1)]
    size = best_size(cut.sizes, max(long, default=0), survey.height, survey.width)
    if size is None:
        return UserError(_too_short(path, survey.times, min(lengths), cut))
    return Plan(entry, survey, size, clips_of(survey.times, size.frames, cut.fps, cut.most))


def read_clips(
    folder: Path, plan: Plan, cut: Cut, numbers: Sequence[int] | None = None
) -> list[Clip]:
    """Clips of a video, in one pass over its file: they never overlap.

    Args:
        folder: that `plan.entry.file` is in.
        plan: of `plan_clips`.
        cut: the one that it was planned with.
        numbers: which of its clips, ascending; None for all.

    Raises:
        UserError: the file does not decode, or the clips are too much at once.
    """
    path, size = folder / plan.entry.file, plan.size
    numbers = range(len(plan.frames)) if numbers is None else numbers
    found = [plan.frames[number] for number in numbers]
    if len(found) * math.prod(size) * 3 > MOST_BYTES:
        raise UserError(
            f"{path} gives {len(found)} clips of {size}, more than {MOST_BYTES} bytes of "
            "pixels: cut it into shorter videos, or lower config.data.clips_per_video"
        )
    corners = [corner(cut, plan.entry.file, number) for number in numbers]
    places = [place for place in corners for _ in range(size.frames)]
    frames = read_frames(path, plan.survey, np.concatenate(found), size[1:], places)
    parts = frames.reshape(len(found), *size, 3)
    begins = [float(plan.survey.times[indices[0]]) for indices in found]
    return [Clip(plan.entry, size, *part) for part in zip(parts, begins, strict=True)]


def _too_short(path: Path, times: np.ndarray, wanted: int, cut: Cut) -> str:
    if not cut.fps:
        return f"{path} has {len(times)} frames, needed are {wanted}: use longer videos"
    lasts = times[-1] - times[0]
    return (
        f"{path} has {len(times)} frames, {lasts:.2f} s, needed are {wanted} at {cut.fps:g} a "
        f"second, {wanted / cut.fps:.2f} s: use longer videos"
    )
