"""One shard of encoded clips: from its videos to its files."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from qvgen_jax.data.captions import CaptionedFile
from qvgen_jax.data.clips import Cut, Size
from qvgen_jax.data.footage import Clip, plan_clips, read_clips
from qvgen_jax.data.records import pack
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import write_json

if TYPE_CHECKING:
    from qvgen_jax.pipeline import Pipeline


class ShardWriter:
    """Encodes the videos of one shard, clips of one size together."""

    def __init__(self, pipe: "Pipeline", folder: Path, described: Path, cut: Cut, batch_size: int):
        self._pipe, self._folder, self._described = pipe, folder, described
        self._cut, self._batch_size = cut, batch_size
        self._files: dict[Size, ArrayRecordWriter] = {}
        self._counts: dict[Size, int] = {}

    def write(
        self,
        entries: Sequence[CaptionedFile],
        max_length: int,
        told: Callable[[int, int, int], None],
    ) -> dict:
        """The shard's description, which is on the disk by then, as its files are.

        `told` is called with how many more videos, clips and bytes are done.
        """
        refused: dict[str, str] = {}
        waiting: dict[Size, list[Clip]] = {size: [] for size in self._cut.sizes}
        for first in range(0, len(entries), self._batch_size):
            videos = entries[first : first + self._batch_size]
            for clip in self._clips(videos, refused):
                waiting[clip.size].append(clip)
                if len(waiting[clip.size]) == self._batch_size:
                    told(0, self._batch_size, self._encode(waiting[clip.size], max_length))
                    waiting[clip.size] = []
            told(len(videos), 0, 0)
        for clips in waiting.values():
            if clips:
                told(0, len(clips), self._encode(clips, max_length))
        return self._close(refused)

    def _clips(self, videos: Sequence[CaptionedFile], refused: dict[str, str]) -> Iterator[Clip]:
        """Of the videos that can be read; adds the others to `refused`."""
        with ThreadPoolExecutor(4) as pool:
            found = pool.map(lambda entry: _read_clips(self._folder, entry, self._cut), videos)
            for entry, clips in zip(videos, found, strict=True):
                if isinstance(clips, UserError):
                    refused[entry.file] = str(clips)
                else:
                    yield from clips

    def _encode(self, clips: Sequence[Clip], max_length: int) -> int:
        """Writes their records; how many bytes these have."""
        pixels = [clip.pixels for clip in clips]
        pixels += [pixels[-1]] * (self._batch_size - len(pixels))  # One shape, one compilation.
        mean, logvar = posterior_of(self._pipe, np.stack(pixels))
        texts = np.asarray(
            self._pipe.encode_prompt([clip.entry.caption for clip in clips], max_length)
        )
        size = 0
        for i, clip in enumerate(clips):
            record = {
                "latent_mean": mean[i],
                "latent_logvar": logvar[i],
                "text_embeds": without_padding(texts[i]),
                "caption": clip.entry.caption,
                "source": clip.entry.file,
                "seconds": f"{clip.seconds:.3f}",
            }
            data = pack(record)
            self._file(clip.size).write(data)
            self._counts[clip.size] = self._counts.get(clip.size, 0) + 1
            size += len(data)
        return size

    def _path(self, size: Size) -> Path:
        return self._described.with_name(f"{self._described.stem}-{size}.array_record")

    def _file(self, size: Size) -> ArrayRecordWriter:
        if size not in self._files:
            # group_size 1: records are read one at a time, in random order.
            part = str(_partial(self._path(size)))
            self._files[size] = ArrayRecordWriter(part, "group_size:1")
        return self._files[size]

    def _close(self, refused: dict[str, str]) -> dict:
        files = {}
        self._described.unlink(missing_ok=True)  # It counts what the files were before.
        for size in self._cut.sizes:
            path = self._path(size)
            path.unlink(missing_ok=True)  # Of a time when a video now refused was good.
            if size in self._files:
                self._files[size].close()
                os.replace(_partial(path), path)
                files[str(size)] = {"file": path.name, "count": self._counts[size]}
        stamps = {name: stamp(self._folder / name) for name in refused}
        shard = {"files": files, "refused": refused, "stamps": stamps}
        write_json(self._described, shard)
        return shard


def stamp(path: Path) -> list[int] | None:
    """Size and time of a file, by which it is seen to be another one later; None if it is gone."""
    if not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _read_clips(folder: Path, entry: CaptionedFile, cut: Cut) -> list[Clip] | UserError:
    """The clips of a video, or the reason why there are none."""
    plan = plan_clips(folder, entry, cut)
    if isinstance(plan, UserError):
        return plan
    try:
        return read_clips(folder, plan, cut)
    except UserError as error:
        return error


def posterior_of(pipe: "Pipeline", pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and log-variance float32 `[clips, f, h, w, c]` of uint8 `[clips, frames, ..., 3]`."""
    posterior = pipe.vae_posterior(pixels.astype(np.float32) / 127.5 - 1.0)
    return tuple(np.asarray(part, np.float32) for part in posterior)


def without_padding(text: np.ndarray) -> np.ndarray:
    """`[tokens, dim]` up to the last row that is not zero; the encoder zeroes what pads."""
    rows = np.flatnonzero(text.any(axis=-1))
    return text[: rows[-1] + 1 if len(rows) else 1]


def _partial(path: Path) -> Path:
    """Where it is written first; apart for processes whose folder is the same without their
    knowing."""
    return path.with_suffix(f".{jax.process_index()}.part")
