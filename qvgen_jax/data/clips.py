"""What of a video becomes clips: how many, at which rate, in which size, cut from where.

Pure functions of numbers: `video.py` reads the frames, `encode.py` makes latents of them.
"""

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qvgen_jax.errors import UserError

CROPS = ("centre", "random")
SIZE = r"[1-9]\d{0,4}(x[1-9]\d{0,4}){2}"
"""The name of a size: `49x480x832`."""


class Size(NamedTuple):
    """Of a clip, in frames and pixels."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


class Cut(NamedTuple):
    """How videos are cut.

    Attributes:
        sizes: buckets; every video goes to the one that loses least of it.
        fps: frames per second of clips; 0 thins a whole video to the clip's number of frames, as
            the release's data loader does.
        most: clips of one video, at most.
        crop: where clips are cut from what covers their size: "centre" or "random".
    """

    sizes: tuple[Size, ...]
    fps: float
    most: int
    crop: str


def parse_size(text: str) -> Size:
    """Of `49x480x832`: frames, height, width.

    Raises:
        UserError: it is something else.
    """
    if not isinstance(text, str) or not re.fullmatch(SIZE, text):
        raise UserError(
            f"a bucket is {text!r}, expected frames x height x width, such as '49x480x832'"
        )
    return Size(*map(int, text.split("x")))


def cut_of(data: Mapping) -> Cut:
    """How the config's `data` section cuts.

    Args:
        data: reads `buckets` (empty: the one size), `num_frames`, `height`, `width`, `fps`,
            `clips_per_video`, `crop`.

    Raises:
        UserError: a bucket is no size, or is there twice.
    """
    if not isinstance(data["buckets"], tuple | list):
        raise UserError(
            f"data.buckets={data['buckets']!r}; expected sizes such as ('49x480x832',), or ()"
        )
    sizes = tuple(map(parse_size, data["buckets"]))
    if len(set(sizes)) < len(sizes):
        raise UserError(f"data.buckets={tuple(data['buckets'])} names a bucket twice: name it once")
    if not sizes:
        sizes = (Size(data["num_frames"], data["height"], data["width"]),)
    return Cut(sizes, data["fps"], data["clips_per_video"], data["crop"])


def at_rate(times: np.ndarray, fps: float) -> np.ndarray:
    """Frames of a video resampled to `fps`: at every moment the one that is on the screen.

    Args:
        times: seconds when each frame appears, ascending, at least one.
        fps: above 0; above the video's own rate, frames are repeated.

    Returns:
        Indices of frames. The last frame stays as long as frames do on average.
    """
    start, end = float(times[0]), float(times[-1])
    end += (end - start) / max(len(times) - 1, 1)
    # A moment on the edge between two frames belongs to the later one, and so does one just before
    # it: many files round their times to milliseconds.
    usual = float(np.median(np.diff(times))) if len(times) > 1 else 1 / fps
    slack = min(usual, 1 / fps) / 8
    count = max(math.floor((end - start + slack) * fps), 1)
    moments = start + slack + np.arange(count) / fps
    return np.searchsorted(times, moments, side="right") - 1


def clips_of(times: np.ndarray, frames: int, fps: float, most: int) -> list[np.ndarray]:
    """Which frames of a video make clips, as indices; none where it is too short.

    Args:
        times: as in `at_rate`.
        frames: of a clip.
        fps: of clips, or 0, see `Cut`.
        most: clips, spread evenly over the video; they never overlap.
    """
    if not fps:
        if len(times) < frames:
            return []
        return [np.arange(frames) * (len(times) // frames)]
    shown = at_rate(times, fps)
    count = min(most, len(shown) // frames)
    centres = (2 * np.arange(count) + 1) * len(shown) / max(2 * count, 1)
    return [shown[start : start + frames] for start in np.floor(centres - frames / 2).astype(int)]


def best_size(sizes: Sequence[Size], frames: int, height: int, width: int) -> Size | None:
    """The bucket that a video loses least in; None where it fills none.

    Its proportions decide, since cropping takes away; then the number of frames, the more the
    better; then the number of pixels, the most that are not above the video's own.

    Args:
        sizes: to choose from.
        frames: that the video has at the clips' rate.
        height, width: of the video, as it is shown.
    """

    def loss(size: Size) -> tuple:
        shape = abs(math.log(size.height / size.width * width / height))
        pixels, own = size.height * size.width, height * width
        return (round(shape, 6), -size.frames, pixels > own, abs(pixels - own), size)

    return min((size for size in sizes if size.frames <= frames), key=loss, default=None)


def corner(cut: Cut, file: str, clip: int) -> tuple[float, float]:
    """Where a clip lies in what covers its size, down and right: 0 to 1, a function of its name."""
    if cut.crop == "centre":
        return 0.5, 0.5
    digest = hashlib.sha256(f"{clip} {file}".encode()).digest()
    return tuple(int.from_bytes(digest[i : i + 4]) / 2**32 for i in (0, 4))
