"""Video files to arrays and back, through PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from qvgen_jax.errors import UserError


def read_video(path: str | Path, cover: tuple[int, int] | None = None) -> np.ndarray:
    """Reads every frame of a file's first video stream: uint8 `[frames, height, width, 3]`.

    Args:
        path: the file.
        cover: (height, width) that frames are scaled to cover, keeping their proportions, and
            then cropped to around their centre; None keeps them as they are.

    Raises:
        UserError: the file is missing, does not decode, or holds no frames; it names the file.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} holds no video stream: remove it or replace the file.")
            frames = [_pixels(frame, cover) for frame in container.decode(video=0)]
    except (av.FFmpegError, OSError) as error:
        raise UserError(
            f"{path} does not decode as a video ({error.strerror}): remove it or replace the file."
        ) from error
    if not frames:
        raise UserError(f"{path} holds no video frames: remove it or replace the file.")
    return np.stack(frames)


def _pixels(frame: av.VideoFrame, cover: tuple[int, int] | None) -> np.ndarray:
    if cover is None or cover == (frame.height, frame.width):
        return frame.to_ndarray(format="rgb24")
    height, width = cover
    scale = max(height / frame.height, width / frame.width)
    scaled = frame.to_ndarray(
        format="rgb24",
        height=max(round(frame.height * scale), height),
        width=max(round(frame.width * scale), width),
        interpolation="BICUBIC",
    )
    top, left = (scaled.shape[0] - height) // 2, (scaled.shape[1] - width) // 2
    return scaled[top : top + height, left : left + width]


def write_video(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 8) -> None:
    """Writes uint8 `[frames, height, width, 3]` as H.264 mp4, 4:2:0: every player reads that.

    Args:
        path: the file to write; its folder exists.
        frames: uint8 `[frames, height, width, 3]`, height and width even.
        fps: frames per second.
        crf: libx264's constant rate factor; 0 is lossless in luma, 8 is visually so.

    Raises:
        ValueError: the array has another type or shape, or an odd height or width.
    """
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or not len(frames):
        raise ValueError(
            "write_video takes uint8 [frames, height, width, 3], "
            f"got {frames.dtype} {list(frames.shape)}"
        )
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise ValueError(f"H.264 4:2:0 needs an even height and width, got {height} x {width}")
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # One thread: how frames are split among threads changes the file's bytes.
        stream.options = {"crf": str(crf), "preset": "medium", "threads": "1"}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
