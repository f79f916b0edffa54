"""Encoded clips as an endless stream of batches whose order is a function of (seed, step).

Nothing about the stream is saved in a checkpoint: to resume at step k is to ask for the batches
from step k on.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import numpy as np

from qvgen_jax.data.encode import EMPTY_TEXT, FORMAT_VERSION, MANIFEST
from qvgen_jax.data.records import DAMAGE, unpack
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object

_FOR_EVER = 2**32
"""Steps. grain's own `repeat(None)` is as long as a length may be, and some lengths add one."""


class EncodedDataset:
    """The clips of a folder that `encode.encode_folder` wrote, by index.

    Attributes:
        folder: where they are.
        manifest: the folder's `manifest.json`: size, counts, settings, refused videos.
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
        files = [str(folder / name) for name in self.manifest["shards"]]
        if missing := [name for name in files if not Path(name).is_file()]:
            raise UserError(f"{missing[0]} is missing: delete {folder} and encode again")
        self.empty_text_embeds = _pad(_empty_text(folder / EMPTY_TEXT, longest), self.max_length)
        self._records = grain.sources.ArrayRecordDataSource(files)
        if (count := len(self._records)) != self.manifest["count"]:
            raise UserError(
                f"{path} counts {self.manifest['count']} clips, its shards hold {count}: delete "
                "the folder and encode again"
            )

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


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    shards = manifest.get("shards")
    plain = isinstance(shards, list) and all(map(_is_shard, shards))
    sizes = ("max_length", "count", "num_frames", "height", "width")
    wrong = [name for name in sizes if type(manifest.get(name)) is not int or manifest[name] < 1]
    if wrong or not plain or not shards:
        raise UserError(
            f"{path} is damaged: {', '.join(wrong) or 'shards'} is not what encoding writes, whole "
            "numbers and names of files beside it; delete the folder and encode again"
        )


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and bool(re.fullmatch(r"clips-\d+\.array_record", name))


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
    dataset: EncodedDataset,
    *,
    seed: int,
    batch_size: int,
    start_step: int = 0,
    captions: bool = False,
    rows: Sequence[int] | None = None,
    threads: int = 4,
) -> Iterator[dict[str, Any]]:
    """Batches for ever, from `start_step` on; every epoch is a new shuffle of all clips.

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
    samples = (
        grain.MapDataset.source(dataset).shuffle(seed=seed).repeat(None).map_with_index(_numbered)
    )
    stream = (
        grain.MapDataset.range(_FOR_EVER * len(rows))
        .slice(slice(start_step * len(rows), None))
        .map(lambda n: samples[n // len(rows) * batch_size + rows[n % len(rows)]])
        .batch(len(rows), batch_fn=partial(_collate, dataset.max_length, captions))
    )
    return iter(stream.to_iter_dataset(grain.ReadOptions(threads, threads)))


def _numbered(index: int, clip: dict[str, Any]) -> dict[str, Any]:
    return {**clip, "sample_index": index}


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
