"""What a validation of the student leaves: rows of `validation.jsonl`, and videos."""

import io
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from qvgen_jax.data.video import read_video

FILE, FOLDER = "validation.jsonl", "validation"
_WIDTH = 512  # Pixels of a pair of videos in TensorBoard, which keeps all of them in one file.


class Validated(NamedTuple):
    """What was found of a student.

    Attributes:
        scalars: for the log; `held_out_loss` among them.
        record: a row of `validation.jsonl`, see docs/validation.md; its step is added.
        fps: frames a second of its videos.
    """

    scalars: dict[str, float]
    record: dict
    fps: float


def drop_videos(workdir: Path, step: int) -> None:
    """Drop the student's videos of `step` and later: the resumed run makes them again."""
    for folder in (workdir / FOLDER).glob("[0-9]*"):
        if int(folder.name) >= step:
            shutil.rmtree(folder)


def told(found: Validated) -> str:
    """One line for a person."""
    scalars, parts = found.scalars, [f"held-out loss {found.scalars['held_out_loss']:.4g}"]
    parts += [f"{name} {scalars[name]:.3g}" for name in ("drift",) if name in scalars]
    if worst := worst_layer(found.record):
        mean, most = (scalars.get(f"weight_error{end}", math.nan) for end in ("", "_worst"))
        parts.append(f"weights off by {mean:.3g}, most in {worst} by {most:.3g}")
    return f"validation: {'; '.join(parts)}; {scalars['validation_seconds']:.1f} s"


def worst_layer(record: Mapping) -> str:
    """The layer whose quantized weights are furthest from its weights; "" of none."""
    errors = {name: _or_worst(row["weight_error"]) for name, row in record["layers"].items()}
    return max(errors, key=errors.__getitem__, default="")


def _or_worst(error: float | None) -> float:
    """An error that is no number is the worst."""
    return math.inf if error is None else error


def side_by_side(workdir: Path, row: Mapping) -> list[Image.Image]:
    """Frames of a pair of videos, the teacher's on the left, small enough for TensorBoard."""
    videos = [read_video(workdir / row[side]) for side in ("teacher", "student")]
    frames = [Image.fromarray(frame) for frame in np.concatenate(videos, axis=2)]
    for frame in frames:
        frame.thumbnail((_WIDTH, _WIDTH))
    return frames


def as_gif(frames: list[Image.Image], fps: float) -> bytes:
    """A GIF, which is what TensorBoard plays."""
    file = io.BytesIO()
    how = {"append_images": frames[1:], "duration": round(1000 / fps), "loop": 0}
    frames[0].save(file, format="GIF", save_all=True, **how)
    return file.getvalue()
