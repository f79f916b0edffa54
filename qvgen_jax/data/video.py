"""Video files to arrays and back, through PyAV."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from qvgen_jax.errors import UserError

# Containers that hold what they show. A playlist (HLS, DASH, concat) names other files and
# addresses, and FFmpeg knows it by its content, whatever the file is called.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
MOST_PIXELS = 1 << 26
"""Of a frame, as a file declares it and as it is scaled; 8K has half as many."""
MOST_BYTES = 4 << 30
"""Of a video's frames in memory: 3400 of 832 x 480."""


def open_video(path: str | Path) -> av.container.InputContainer:
    """Opens a file, never an address, for reading: a context manager.

    Raises:
        av.FFmpegError, OSError: it does not open, or is no container of a video.
    """
    # Told as a file, or FFmpeg would take `http:` at the start of a name for a protocol.
    address = f"file:{Path(path).absolute()}"
    return av.open(address, options=dict(_OPTIONS), metadata_errors="replace")


def read_video(path: str | Path, cover: tuple[int, int] | None = None) -> np.ndarray:
    """Reads every frame of a file's first video stream: uint8 `[frames, height, width, 3]`.

    Args:
        path: the file.
        cover: (height, width) that frames are scaled to cover, keeping their proportions, and
            then cropped to around their centre; None keeps them as they are.

    Raises:
        UserError: the file is missing, does not decode, is damaged, cut short or too large, or
            holds no frames; it names the file.
    """
    try:
        if _is_cut_short(Path(path)):
            raise _refusal(path, "is cut short: the file ends inside of its data")
        with open_video(path) as container:
            if not container.streams.video:
                raise _refusal(path, "holds no video stream")
            frames = _frames(path, container, cover)
    except UserError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise _refusal(path, f"does not decode as a video ({error.strerror})") from error
    except (ValueError, OverflowError) as error:  # A pixel format that does not convert, say.
        raise _refusal(path, f"does not decode as a video ({error})") from error
    if not frames:
        raise _refusal(path, "holds no video frames")
    return np.stack(frames)


def _refusal(path: str | Path, fault: str) -> UserError:
    return UserError(f"{path} {fault}: remove it or replace the file.")


def _is_cut_short(path: Path) -> bool:
    """Whether an mp4 or mov file ends before its last box does. FFmpeg shows what is there."""
    size, place = path.stat().st_size, 0
    with path.open("rb") as file:
        while place < size:
            file.seek(place)
            head = file.read(16)
            if (not place and head[4:8] != b"ftyp") or len(head) < 8:
                return False
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0: to the end; what is less is no box.
                return False
            place += length
    return place > size


def _frames(
    path: str | Path, container: av.container.InputContainer, cover: tuple[int, int] | None
) -> list[np.ndarray]:
    stream, frames = container.streams.video[0], []
    if stream.codec_context is None:
        raise _refusal(path, "is in a codec that is not known here")
    _check_size(path, stream.codec_context.height, stream.codec_context.width)
    stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
    for frame in container.decode(stream):
        # FFmpeg fills what it cannot read with what it guesses, and says so.
        if frame.is_corrupt:
            raise _refusal(path, f"is damaged: frame {len(frames)} does not decode")
        frames.append(_pixels(path, frame, cover))
        if frames[-1].shape != frames[0].shape:
            raise _refusal(path, f"changes its size at frame {len(frames) - 1}")
        if len(frames) * frames[0].nbytes > MOST_BYTES:
            raise UserError(
                f"{path} has more than {len(frames) - 1} frames, {MOST_BYTES} bytes of pixels: cut "
                "it into shorter videos."
            )
    return frames


def _check_size(path: str | Path, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{path} has frames of {height} x {width} pixels, expected at most {MOST_PIXELS}: "
            "scale it down, or remove it."
        )


def _pixels(path: str | Path, frame: av.VideoFrame, cover: tuple[int, int] | None) -> np.ndarray:
    if cover is None or cover == (frame.height, frame.width):
        return frame.to_ndarray(format="rgb24")
    height, width = cover
    scale = max(height / frame.height, width / frame.width)
    size = max(round(frame.height * scale), height), max(round(frame.width * scale), width)
    _check_size(path, *size)  # A line of pixels, scaled to cover, is a plain of them.
    scaled = frame.to_ndarray(
        format="rgb24", height=size[0], width=size[1], interpolation="BICUBIC"
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
