"""Video files to arrays and back, through PyAV."""

import bisect
import contextlib
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

from qvgen_jax.errors import UserError

# Containers that hold what they show. A playlist (HLS, DASH, concat) names other files and
# addresses, and FFmpeg knows it by its content, whatever the file is called.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif"
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
MOST_PIXELS = 1 << 26
"""Of a frame, as a file declares it and as it is scaled; 8K has half as many."""
_LONGEST = 24 * 3600
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
            then cropped to around their centre; None keeps their size. Either way they stand
            upright, with square pixels.

    Raises:
        UserError: the file is missing, does not decode, is damaged, cut short or too large, or
            holds no frames; it names the file.
    """
    frames: list[np.ndarray] = []
    with _opened(path) as (container, stream):
        for frame in _decoded(path, container, stream):
            frames.append(_pixels(path, frame, _ratio(stream), cover))
            if frames[-1].shape != frames[0].shape:
                raise _refusal(path, f"changes its size at frame {len(frames) - 1}")
            _check_bytes(path, len(frames), frames[0])
    if not frames:
        raise _refusal(path, "holds no video frames")
    return np.stack(frames)


class Survey(NamedTuple):
    """What is known of a video before its frames are wanted.

    Attributes:
        times: seconds when each frame appears, ascending.
        stamps: the same as the file counts.
        clocked: whether it does; else stamps are the frames' order, and their rate is even.
        height, width: as it is shown, upright and with square pixels.
    """

    times: np.ndarray
    stamps: np.ndarray
    clocked: bool
    height: int
    width: int


def survey_video(path: str | Path) -> Survey:
    """When each frame of a file appears, and its size; one frame alone is decoded.

    Raises:
        UserError: as `read_video`, for what can be seen without decoding the rest.
    """
    with _opened(path) as (container, stream):
        stamps: list[int | None] = []
        first = None
        for packet in container.demux(stream):
            if packet.size and not packet.is_discard:
                stamps.append(packet.pts)
            if first is None:
                first = next(iter(packet.decode()), None)
        rate = stream.average_rate or stream.guessed_rate
        base = stream.time_base
        ratio = _ratio(stream)
    if first is None:
        raise _refusal(path, "holds no video frames")
    size = _upright(_square(first, ratio), _quarter_turns(first))
    if None in stamps or len(set(stamps)) < len(stamps) or base is None:  # AVI, say.
        if not rate:
            raise _refusal(path, "does not say when its frames appear")
        order = np.arange(len(stamps))
        return Survey(order / float(rate), order, False, *size)
    found = np.sort(np.array(stamps, np.int64))
    if (lasts := float((found[-1] - found[0]) * base)) > _LONGEST:
        raise _refusal(path, f"says that it lasts {lasts:.0f} s, expected at most {_LONGEST}")
    return Survey(found * float(base), found, True, *size)


def read_frames(
    path: str | Path,
    survey: Survey,
    indices: Sequence[int],
    cover: tuple[int, int],
    places: Sequence[tuple[float, float]] | None = None,
) -> np.ndarray:
    """Reads some frames of a video, upright and scaled: uint8 `[indices, height, width, 3]`.

    Args:
        path: the file.
        survey: of `survey_video`.
        indices: of `survey.times`, not descending.
        cover: (height, width) to scale to and cut out, see `read_video`.
        places: where each of them is cut from what covers, down and right, 0 to 1; the centre
            if None.

    Raises:
        UserError: as `read_video`, but frames behind the last wanted are never looked at.
    """
    wanted, found = [int(survey.stamps[index]) for index in indices], []
    places = places or [(0.5, 0.5)] * len(wanted)
    usual = int(np.median(np.diff(survey.stamps))) if len(survey.stamps) > 1 else 1
    _check_bytes(path, len(wanted), np.broadcast_to(np.uint8(0), (*cover, 3)))
    with _opened(path) as (container, stream):
        frames = _decoded(path, container, stream)
        for frame, until in _on_screen(frames, usual, survey.clocked):
            shown = range(len(found), bisect.bisect_left(wanted, until))
            at = {places[i] for i in shown}
            cut = {place: _pixels(path, frame, _ratio(stream), cover, place) for place in at}
            found += [cut[places[i]] for i in shown]
            if len(found) == len(wanted):
                return np.stack(found)
    raise _refusal(path, f"is damaged: {len(wanted) - len(found)} of its frames do not decode")


def _on_screen(
    frames: Iterable[av.VideoFrame], usual: int, clocked: bool
) -> Iterator[tuple[av.VideoFrame, float]]:
    """Each frame and when the next takes its place; the last stays for the `usual` time."""
    before, since = None, 0
    for order, frame in enumerate(frames):
        at = order
        if clocked:
            at = since + usual if frame.pts is None else frame.pts
        if before is not None:
            yield before, at
        before, since = frame, at
    if before is not None:
        yield before, since + usual


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file and its first video stream; what goes wrong with them within is told as refusals."""
    try:
        if _is_cut_short(Path(path)):
            raise _refusal(path, "is cut short: the file ends inside of its data")
        with open_video(path) as container:
            if not container.streams.video:
                raise _refusal(path, "holds no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise _refusal(path, "is in a codec that is not known here")
            _check_size(path, stream.codec_context.height, stream.codec_context.width)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            yield container, stream
    except UserError:
        raise
    except (av.FFmpegError, OSError) as error:
        raise _refusal(path, f"does not decode as a video ({error.strerror})") from error
    except (ValueError, OverflowError) as error:  # A pixel format that does not convert, say.
        raise _refusal(path, f"does not decode as a video ({error})") from error


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


def _decoded(
    path: str | Path, container: av.container.InputContainer, stream: av.VideoStream
) -> Iterator[av.VideoFrame]:
    """The frames in the order in which they are shown."""
    for number, frame in enumerate(container.decode(stream)):
        # FFmpeg fills what it cannot read with what it guesses, and says so.
        if frame.is_corrupt:
            raise _refusal(path, f"is damaged: frame {number} does not decode")
        yield frame


def _check_size(path: str | Path, height: int, width: int) -> None:
    if height * width > MOST_PIXELS:
        raise UserError(
            f"{path} has frames of {height} x {width} pixels, expected at most {MOST_PIXELS}: "
            "scale it down, or remove it."
        )


def _check_bytes(path: str | Path, count: int, frame: np.ndarray) -> None:
    if count * frame.size > MOST_BYTES:
        raise UserError(
            f"{path} has more than {count - 1} frames, {MOST_BYTES} bytes of pixels: cut it into "
            "shorter videos."
        )


def _quarter_turns(frame: av.VideoFrame) -> int:
    """By which the file says that the frame is turned left to stand upright: phones do not turn
    pixels."""
    return round(frame.rotation / 90) % 4


def _ratio(stream: av.VideoStream) -> float:
    """Width of a pixel by its height."""
    return float(stream.sample_aspect_ratio or 1)


def _square(frame: av.VideoFrame, ratio: float) -> tuple[int, int]:
    """Height and width of the frame as it lies in the file, with square pixels."""
    return frame.height, max(round(frame.width * ratio), 1)


def _upright(size: tuple[int, int], turns: int) -> tuple[int, int]:
    return size[::-1] if turns % 2 else size


def _pixels(
    path: str | Path,
    frame: av.VideoFrame,
    ratio: float,
    cover: tuple[int, int] | None,
    place: tuple[float, float] = (0.5, 0.5),
) -> np.ndarray:
    """uint8 `[height, width, 3]`, upright; if asked, scaled to cover a size and cut at `place`."""
    turns, (tall, wide) = _quarter_turns(frame), _square(frame, ratio)
    if cover is None:
        cover = _upright((tall, wide), turns)
    height, width = _upright(cover, turns)  # As the frame lies.
    scale = max(height / tall, width / wide)
    size = max(round(tall * scale), height), max(round(wide * scale), width)
    _check_size(path, *size)  # A line of pixels, scaled to cover, is a plain of them.
    if size == (frame.height, frame.width):
        scaled = frame.to_ndarray(format="rgb24")
    else:
        scaled = frame.to_ndarray(
            format="rgb24", height=size[0], width=size[1], interpolation="BICUBIC"
        )
    scaled = np.rot90(scaled, turns)
    top, left = ((n - m) * at for n, m, at in zip(scaled.shape, cover, place, strict=False))
    top, left = round(top), round(left)
    return np.ascontiguousarray(scaled[top : top + cover[0], left : left + cover[1]])


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
        # The same bytes of the same frames. One thread: how frames are split among threads changes
        # them. And x264's AVX-512 code reads memory that it never wrote: this leaves it out.
        same = {"threads": "1", "x264-params": "cpu-independent=1"}
        stream.options = {"crf": str(crf), "preset": "medium", **same}
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
