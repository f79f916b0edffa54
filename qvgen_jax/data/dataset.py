"""Encoded clips as an endless stream of batches whose order is a function of (seed, step).

Nothing about the stream is saved in a checkpoint: to resume at step k is to ask for the batches
from step k on. All clips of a batch have one size.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from qvgen_jax.data.clips import SIZE, Size, parse_size
from qvgen_jax.data.encode import EMPTY_TEXT, FORMAT_VERSION, MANIFEST
from qvgen_jax.data.live import LiveDataset
from qvgen_jax.data.records import DAMAGE, unpack
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object

_FOR_EVER = 2**32
"""Steps. grain's own `repeat(None)` is as long as a length may be, and some lengths add one."""


class EncodedDataset:
    """The clips of a folder that `encode.encode_folder` wrote, by index.

    Attributes:
        folder: where they are.
        manifest: the folder's `manifest.json`: sizes, counts, settings, refused videos.
        buckets: the indices of each size's clips; a size without clips is none.
        max_length: text tokens that batches are padded to.
        empty_text_embeds: the empty prompt, `[max_length, dim]`, zero behind its tokens.
    """

    def __init__(self, folder: str | Path, max_length: int | None = None):
        """
        Args:
            folder: of the encoded clips.
            max_length: text tokens of a batch; by default as encoded.

        Raises:
            UserError: the folder holds no complete encoding, a damaged one, or one of another
                format or length.
        """
        self.folder = folder = Path(folder)
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder} holds no finished encoding ({MANIFEST} is missing): "
                "run the encode job to make or finish it"
            )
        self.manifest = read_object(path, "delete the folder and encode again")
        version = self.manifest.get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{path} has format_version {version}, this program reads {FORMAT_VERSION}: "
                "delete the folder and encode again"
            )
        _check_manifest(self.manifest, path)
        longest = self.manifest["max_length"]
        self.max_length = longest if max_length is None else max_length
        if self.max_length < longest:
            raise UserError(
                f"{folder} holds texts of up to {longest} tokens, max_length is {max_length}: "
                "raise it, or encode again with it to another folder"
            )
        clips = self.manifest["clips"]
        files = [str(folder / name) for bucket in clips.values() for name in bucket["shards"]]
        if missing := [name for name in files if not Path(name).is_file()]:
            raise UserError(f"{missing[0]} is missing: delete {folder} and encode again")
        self.empty_text_embeds = _pad(_empty_text(folder / EMPTY_TEXT, longest), self.max_length)
        self._records = grain.sources.ArrayRecordDataSource(files)
        if (count := len(self._records)) != self.manifest["count"]:
            raise UserError(
                f"{path} counts {self.manifest['count']} clips, its shards hold {count}: delete "
                "the folder and encode again"
            )
        self.buckets: dict[Size, range] = {}
        start = 0
        for name, bucket in clips.items():
            if bucket["count"]:
                end = start + bucket["count"]
                self.buckets[parse_size(name)] = range(start, end)
                start = end

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One clip: `latent_mean`, `latent_logvar` `[f, h, w, c]`, `text_embeds` `[tokens, dim]`
        without padding, `caption`, `source`.

        Raises:
            UserError: it is damaged.
        """
        try:
            return unpack(self._records[index])
        except DAMAGE as error:
            raise UserError(
                f"{self.folder}: clip {index} is damaged ({error}): delete the folder and encode "
                "again"
            ) from error


Dataset = EncodedDataset | LiveDataset
"""Clips by index, in buckets."""


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    wrong = [name for name in ("max_length", "count") if not _is_count(manifest.get(name), 1)]
    clips = manifest.get("clips")
    if not isinstance(clips, dict) or not all(map(_is_bucket, clips, clips.values())):
        wrong.append("clips")
    elif "count" not in wrong:
        wrong += ["count"] * (sum(b["count"] for b in clips.values()) != manifest["count"])
    if wrong:
        raise UserError(
            f"{path} is damaged: {', '.join(wrong)} is not what encoding writes, whole numbers and "
            "names of files beside it; delete the folder and encode again"
        )


def _is_count(value: Any, least: int) -> bool:
    return type(value) is int and value >= least


def _is_bucket(name: str, bucket: Any) -> bool:
    """Whether it is `{"count": ..., "shards": [...]}` of a size's name."""
    if not re.fullmatch(SIZE, name) or not isinstance(bucket, Mapping):
        return False
    shards, file = bucket.get("shards"), rf"clips-\d+-{name}\.array_record"
    plain = isinstance(shards, list) and all(
        isinstance(shard, str) and re.fullmatch(file, shard) for shard in shards
    )
    return plain and _is_count(bucket.get("count"), 0) and bool(shards) == bool(bucket["count"])


def _empty_text(path: Path, longest: int) -> np.ndarray:
    try:
        empty = unpack(path.read_bytes())["text_embeds"]
        if empty.ndim == 2 and 1 <= len(empty) <= longest:
            return empty
        fault = f"shape {list(empty.shape)}"
    except (OSError, AttributeError, *DAMAGE) as error:
        fault = str(error)
    raise UserError(f"{path} is damaged ({fault}): delete the folder and encode again")


def batches(
    dataset: Dataset,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    captions: bool = False,
    rows: Sequence[int] | None = None,
    threads: int = 4,
) -> Iterator[dict[str, Any]]:
    """Batches for ever, from `start_step` on; every epoch is a new shuffle of all clips.

    Of several sizes, each has its share of an epoch's batches, and which comes when is shuffled
    too.

    Args:
        dataset: the clips.
        seed: of the order.
        batch_size: samples per step over all processes.
        start_step: the step whose batch comes first.
        captions: whether batches hold the captions too, which `jax.jit` does not take.
        rows: which of every batch are wanted here, in this order; all if None. Only they are read.
        threads: read ahead with this many; one batch each is kept ready.

    Returns:
        An iterator of dicts, b as many as rows: `latent_mean`, `latent_logvar`
        float32 `[b, f, h, w, c]`; `text_embeds` `[b, max_length, dim]`, zero behind the tokens;
        `sample_index` int32 `[b]`, the sample's number since step 0 over all processes,
        `step * batch_size + i`, never twice the same; with `captions` also `caption`, strings.

    Raises:
        ValueError: `batch_size` is not positive.
    """
    if batch_size <= 0:
        raise ValueError(f"batch_size is {batch_size}, expected a positive number")
    rows = range(batch_size) if rows is None else rows
    places = list(dataset.buckets.values())
    shuffled = [
        grain.MapDataset.range(place.start, place.stop).shuffle(seed=seed).repeat(None)
        for place in places
    ]
    turns = Turns([len(place) for place in places], batch_size, seed)

    def sample(n: int) -> dict[str, Any]:
        step, row = n // len(rows), rows[n % len(rows)]
        bucket, turn = turns(step)
        clip = dataset[int(shuffled[bucket][turn * batch_size + row])]
        return {**clip, "sample_index": step * batch_size + row}

    stream = (
        grain.MapDataset.range(_FOR_EVER * len(rows))
        .slice(slice(start_step * len(rows), None))
        .map(sample)
        .batch(len(rows), batch_fn=partial(_collate, dataset.max_length, captions))
    )
    return iter(stream.to_iter_dataset(grain.ReadOptions(threads, threads)))


def steps_by_shape(dataset: Dataset, batch_size: int) -> dict[tuple[int, ...], int]:
    """How many batches of an epoch have clips with latents `[f, h, w, c]` of each shape."""
    found: dict[tuple[int, ...], int] = {}
    for place in dataset.buckets.values():
        shape = dataset[place.start]["latent_mean"].shape
        found[shape] = found.get(shape, 0) + -(-len(place) // batch_size)
    return found


class Turns:
    """Which bucket a step's batch is of, and how many of its batches came before: of step alone."""

    def __init__(self, counts: Sequence[int], batch_size: int, seed: int):
        """
        Args:
            counts: of each bucket's clips, above 0.
            batch_size: of a step.
            seed: of the order.
        """
        self.batches = [-(-count // batch_size) for count in counts]
        labels, seed = np.repeat(np.arange(len(counts)), self.batches), int(seed)

        @lru_cache(maxsize=4)  # Threads read ahead over the end of an epoch.
        def epoch(number: int) -> tuple[np.ndarray, np.ndarray]:
            order = np.random.default_rng([seed, number]).permutation(labels)
            before = np.zeros(len(order), int)
            for bucket in range(len(counts)):
                mine = order == bucket
                before[mine] = np.arange(mine.sum())
            return order, before

        self._epoch = epoch

    def __call__(self, step: int) -> tuple[int, int]:
        if len(self.batches) == 1:
            return 0, step
        number, place = divmod(step, sum(self.batches))
        order, before = self._epoch(number)
        bucket = int(order[place])
        return bucket, number * self.batches[bucket] + int(before[place])


def _collate(max_length: int, captions: bool, clips: Sequence[dict[str, Any]]) -> dict[str, Any]:
    batch = {
        "latent_mean": np.stack([clip["latent_mean"] for clip in clips]),
        "latent_logvar": np.stack([clip["latent_logvar"] for clip in clips]),
        "text_embeds": np.stack([_pad(clip["text_embeds"], max_length) for clip in clips]),
        "sample_index": np.array([clip["sample_index"] for clip in clips], np.int32),
    }
    if captions:
        batch["caption"] = [clip["caption"] for clip in clips]
    return batch


def _pad(text: np.ndarray, max_length: int) -> np.ndarray:
    return np.pad(text, ((0, max_length - len(text)), (0, 0)))
