"""Clips encoded when a batch asks for them: nothing is written, a small run starts at once.

The clips, their order and what is cut out of the videos are those of an encoded folder.
"""

import hashlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qvgen_jax.data.captions import folder_of, read_captions
from qvgen_jax.data.clips import Cut, Size
from qvgen_jax.data.encode import check_share
from qvgen_jax.data.footage import Plan, plan_clips, read_clips
from qvgen_jax.data.shard import posterior_of, without_padding
from qvgen_jax.errors import UserError

if TYPE_CHECKING:
    from qvgen_jax.pipeline import Pipeline

_MOST_KEPT = 1 << 30
"""Bytes of latents that stay in memory, so that later epochs need not encode them again."""
_CAPTIONS = 64  # Encoded at once.


class LiveDataset:
    """What `dataset.batches` takes, straight from videos.

    Attributes:
        buckets, max_length, empty_text_embeds: as of `EncodedDataset`.
        refused: videos that give no clip, and why.
    """

    def __init__(
        self,
        pipe: "Pipeline",
        source: str | Path,
        *,
        cut: Cut,
        max_length: int,
        most_refused: float = 1.0,
        log: Callable[[str], None] = print,
    ):
        """Looks at every video, and encodes every caption.

        Args:
            pipe, source, cut, most_refused, log: as of `encode_folder`.
            max_length: text tokens of a batch.

        Raises:
            UserError: no captions, or too many videos that cannot be used.
        """
        entries, self._folder = read_captions(Path(source)), folder_of(Path(source))
        self._pipe, self._cut, self.max_length = pipe, cut, max_length
        with ThreadPoolExecutor(4) as pool:
            plans = list(pool.map(lambda entry: plan_clips(self._folder, entry, cut), entries))
        self.refused = {
            entry.file: str(plan)
            for entry, plan in zip(entries, plans, strict=True)
            if isinstance(plan, UserError)
        }
        for name, reason in self.refused.items():
            log(f"set aside {name}: {reason}")
        check_share(self.refused, len(entries), most_refused)
        self._clips: list[tuple[Plan, int]] = []
        self.buckets: dict[Size, range] = {}
        for size in cut.sizes:
            mine = [plan for plan in plans if isinstance(plan, Plan) and plan.size == size]
            start = len(self._clips)
            self._clips += [(plan, i) for plan in mine for i in range(len(plan.frames))]
            if len(self._clips) > start:
                self.buckets[size] = range(start, len(self._clips))
        captions = sorted({plan.entry.caption for plan, _ in self._clips})
        self._texts = self._encode(captions)
        empty = self._encode([""])[""]
        self.empty_text_embeds = np.pad(empty, ((0, max_length - len(empty)), (0, 0)))
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._bytes, self._lock = 0, threading.Lock()
        log(f"{len(self._clips)} clips of {len(entries)} videos, encoded when a batch asks for one")

    def _encode(self, captions: list[str]) -> dict[str, np.ndarray]:
        found = {}
        for start in range(0, len(captions), _CAPTIONS):  # The encoder may move for every call.
            some = captions[start : start + _CAPTIONS]
            texts = np.asarray(self._pipe.encode_prompt(some, self.max_length))
            found |= {c: without_padding(text) for c, text in zip(some, texts, strict=True)}
        return found

    def digest(self) -> str:
        """Of all that batches and their order depend on, but for the files' pixels."""
        told = hashlib.sha256()
        for plan, number in self._clips:
            told.update(repr((plan.entry, plan.size, number)).encode())
            told.update(np.ascontiguousarray(plan.frames[number], np.int64).tobytes())
        return told.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As of `EncodedDataset`.

        Raises:
            UserError: its video is gone, or does not decode.
        """
        plan, number = self._clips[index]
        if index not in self._kept:
            pixels = read_clips(self._folder, plan, self._cut, [number])[0].pixels
            with self._lock:  # Several threads ask; the devices do one at a time anyway.
                mean, logvar = (part[0] for part in posterior_of(self._pipe, pixels[None]))
                size = mean.nbytes + logvar.nbytes
                if index not in self._kept and self._bytes + size <= _MOST_KEPT:
                    self._kept[index] = mean, logvar
                    self._bytes += size
        else:
            mean, logvar = self._kept[index]
        entry = plan.entry
        return {
            "latent_mean": mean,
            "latent_logvar": logvar,
            "text_embeds": self._texts[entry.caption],
            "caption": entry.caption,
            "source": entry.file,
        }
