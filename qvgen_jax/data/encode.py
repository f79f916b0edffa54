"""Videos and captions to shards of latents and text embeddings, once, before training.

A folder of encoded clips holds

    settings.json            what it was made from and with; a run with other settings is refused
    clips-00000-17x64x64.array_record
                             one record per clip of that size: `latent_mean`, `latent_logvar`
                             (float32 `[f, h, w, c]`, in the transformer's normalised space),
                             `text_embeds` `[tokens, dim]` without padding, `caption`, `source`,
                             `seconds` where it begins in its video
    clips-00000.json         how many clips the shard's files hold, which videos were refused, why
    empty_text_embeds.msgpack  the empty prompt, for caption dropout
    refused.jsonl            one line {"file", "reason"} per video that was set aside
    manifest.json            all of it in one place, and with which versions it was made; written
                             last, so its presence means "complete"

The posterior is stored, not a sample of it, so that every epoch draws its own latents. A shard is
written whole or not at all, and the same videos give the same bytes however often the work was
stopped and taken up again.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from qvgen_jax import hosts
from qvgen_jax.components import fingerprint
from qvgen_jax.data.captions import folder_of, read_captions
from qvgen_jax.data.clips import Cut
from qvgen_jax.data.records import pack
from qvgen_jax.data.shard import ShardWriter, stamp, without_padding
from qvgen_jax.errors import UserError
from qvgen_jax.file_lock import locked
from qvgen_jax.json_file import read_object, write_json, write_whole

if TYPE_CHECKING:
    from qvgen_jax.pipeline import Pipeline

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text_embeds.msgpack"
REFUSED = "refused.jsonl"
_PACKAGES = ("qvgen-jax", "jax", "av", "numpy")
_SECONDS_QUIET = 10  # Between two lines about how far it is.
_DAY = 24 * 60.0  # Minutes that one host may take longer than another.


def encode_folder(
    pipe: "Pipeline",
    source: str | Path,
    out: str | Path,
    *,
    cut: Cut,
    max_length: int | None = None,
    shard_size: int = 256,
    batch_size: int = 8,
    most_refused: float = 1.0,
    retry: bool = True,
    model: str = "",
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Encodes a folder of videos; the same call again continues where it stopped.

    Videos are turned upright, resampled to the rate, sent to the bucket that fits, scaled to cover
    it and cropped, see `qvgen_jax.data.clips`. One that is too short or does not decode is set
    aside with its reason. Over several processes that share a disk, each encodes its part.

    Args:
        pipe: gives `vae_posterior` and `encode_prompt`.
        source: the folder of videos with their captions file, or that file, see
            `captions.read_captions`.
        out: the folder to write to.
        cut: how clips are cut from videos.
        max_length: text tokens; by default the pipeline's own.
        shard_size: videos per shard.
        batch_size: clips per call of the VAE.
        most_refused: share of the videos that may be set aside.
        retry: whether to try again those of finished shards that were replaced since.
        model: what the pipeline is called, for the manifest.
        log: takes one line of progress.

    Returns:
        The manifest.

    Raises:
        UserError: no captions, no video that can be used, more of them set aside than
            `most_refused` allows, or `out` holds other encoded clips. What is encoded stays.
    """
    source, out = Path(source), Path(out)
    entries = read_captions(source)
    settings = {
        "format_version": FORMAT_VERSION,
        "source": str(source),
        "captions": _digest(json.dumps(entries)),
        "model": fingerprint(pipe.vae, pipe.text_encoder),
        "buckets": [str(size) for size in cut.sizes],
        "fps": cut.fps,
        "clips_per_video": cut.most,
        "crop": cut.crop,
        "max_length": pipe.defaults["max_length"] if max_length is None else max_length,
        "shard_size": shard_size,
    }
    shared = _claim(out, settings)
    parts = [entries[start : start + shard_size] for start in range(0, len(entries), shard_size)]
    files = [out / f"clips-{number:05d}.json" for number in range(len(parts))]
    every = jax.process_count() if shared else 1  # Else each process has a disk to fill.
    here = range(jax.process_index() % every, len(parts), every)
    speaks, shards = hosts.is_first() or not shared, []
    changed, told = not (out / MANIFEST).exists(), _Told(sum(len(parts[i]) for i in here), log)
    finished = functools.partial(_finished_shard, folder_of(source), retry=retry)
    for number in here:
        part, described = parts[number], files[number]
        with contextlib.ExitStack() as stack:
            shard = finished(described)
            if shard is None:
                stack.enter_context(locked(out, f"{described.stem}.", log))
                shard = finished(described)  # By the run that held it until now.
            if shard is None:
                writer = ShardWriter(pipe, folder_of(source), described, cut, batch_size)
                shard, changed = writer.write(part, settings["max_length"], told.add), True
                for name, reason in shard["refused"].items():
                    log(f"set aside {name}: {reason}")
            else:
                told.skip(len(part))
        shards.append(shard)
        try:
            _check_refused(out, shards, len(entries), most_refused, listed=speaks)
        except UserError:
            if not shared:
                raise
            break  # To where the others wait, and see the same.
    told.end()
    if shared:
        hosts.barrier("clips are encoded", minutes=_DAY)
        _check_refused(out, _described(files), len(entries), most_refused, listed=speaks)
    if speaks and (changed or not _is_newest(out / MANIFEST, files)):
        _write_manifest(pipe, out, settings, files, model)
    if shared:
        hosts.barrier("the manifest of clips is written")
    return read_object(out / MANIFEST, "delete it, and encode again")


class _Told:
    """How far it is, said now and then."""

    def __init__(self, total: int, log: Callable[[str], None]):
        self._total, self._log, self._done, self._skipped = total, log, 0, 0
        self._bytes = self._clips = 0
        self._start = self._last = time.monotonic()

    def skip(self, videos: int) -> None:
        """Of a shard that was finished before."""
        self._done += videos
        self._skipped += videos

    def add(self, videos: int, clips: int, size: int) -> None:
        """So many more are done."""
        self._done += videos
        self._clips += clips
        self._bytes += size
        quiet = time.monotonic() - self._last
        if videos and quiet > _SECONDS_QUIET and self._done < self._total:
            self._say()

    def end(self) -> None:
        """Say the whole, if there was anything to do."""
        if self._done > self._skipped:
            self._say()

    def _say(self) -> None:
        self._last = time.monotonic()
        seconds, new = self._last - self._start, self._done - self._skipped
        left = seconds / new * (self._total - self._done)
        each = f"{seconds / new:.2f} s a video"
        if self._clips:
            each += f", {self._bytes / self._clips / 1e6:.3f} MB a clip"
        ahead = f"; {left / 60:.0f} min left" if self._done < self._total else ""
        self._log(
            f"encoded {self._done} of {self._total} videos, {self._clips} clips ({each}){ahead}"
        )


def _is_newest(manifest: Path, files: Sequence[Path]) -> bool:
    """Whether no shard was written after the manifest was: by a run that another host stopped."""
    at = manifest.stat().st_mtime_ns
    return all(path.exists() and path.stat().st_mtime_ns <= at for path in files)


def _claim(out: Path, settings: dict) -> bool:
    """Makes `out` the folder of an encoding with these settings; whether several processes share
    it.

    Raises:
        UserError: it is another's.
    """
    shared = not hosts.is_alone() and hosts.share(out)
    if (hosts.is_first() or not shared) and not (out / "settings.json").exists():
        _claim_here(out / "settings.json", settings)
    hosts.barrier("the folder of clips is claimed")
    _claim_here(out / "settings.json", settings)  # By now it is there: all see the same.
    return shared


def _claim_here(path: Path, settings: dict) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    before = read_object(path, f"delete {path.parent}, and encode again")
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        differences = ", ".join(f"{k} {before.get(k)!r} -> {settings[k]!r}" for k in changed)
        raise UserError(
            f"{path.parent} holds clips encoded with other settings ({differences}): "
            "delete that folder or encode to another"
        )


def _check_refused(
    out: Path, shards: Sequence[dict], total: int, most: float, *, listed: bool
) -> None:
    """Ends it where too much was set aside so far; if `listed`, writes what was, and why."""
    refused = _refused(shards)
    if listed:  # By one of the processes that share the folder.
        rows = ({"file": name, "reason": reason} for name, reason in refused.items())
        text = "".join(json.dumps(row) + "\n" for row in rows)
        if not (out / REFUSED).is_file() or (out / REFUSED).read_text(encoding="utf-8") != text:
            write_whole(out / REFUSED, text)
    check_share(refused, total, most, f"; all are in {out / REFUSED}")


def check_share(refused: Mapping[str, str], total: int, most: float, where: str = "") -> None:
    """See that not too many videos were set aside.

    Args:
        refused: their names, and why.
        total: of all videos.
        most: which share of them may be.
        where: the end of a sentence, where there are more reasons than it has.

    Raises:
        UserError: they are more, or all.
    """
    if len(refused) <= most * total and len(refused) < total:
        return
    reasons = list(refused.values())
    shown = "; ".join(reasons[:3]) + (where if len(reasons) > 3 else "")
    if len(refused) == total:
        raise UserError(
            f"none of the {total} videos can be used: {shown}. Mend them and run the same command "
            "again"
        )
    raise UserError(
        f"{len(refused)} of {total} videos cannot be used, or more: {shown}. Mend them and run the "
        f"same command again, or train without them: --config.data.most_refused={most:g} is the "
        "share that may be left out"
    )


def _described(files: Sequence[Path]) -> list[dict]:
    """Of the shards that are finished."""
    return [read_object(path, "delete it, and encode again") for path in files if path.exists()]


def _refused(shards: Sequence[dict]) -> dict[str, str]:
    return {name: reason for shard in shards for name, reason in shard["refused"].items()}


def _finished_shard(folder: Path, described: Path, retry: bool) -> dict | None:
    """A shard's description if it is finished and, to `retry`, no refused video was replaced."""
    if not described.exists():
        return None
    shard = read_object(described, "delete it, and encode again")
    if not retry:
        return shard
    replaced = any(stamp(folder / name) != shard["stamps"][name] for name in shard["refused"])
    return None if replaced else shard


def _write_manifest(
    pipe: "Pipeline", out: Path, settings: dict, files: Sequence[Path], model: str
) -> None:
    shards = _described(files)
    if len(shards) < len(files):
        raise UserError(
            f"{out} misses {len(files) - len(shards)} of {len(files)} shards, which other "
            "processes wrote: give config.data.encoded a folder that all of them share"
        )
    empty = np.asarray(pipe.encode_prompt([""], settings["max_length"]))[0]
    (out / EMPTY_TEXT).write_bytes(pack({"text_embeds": without_padding(empty)}))
    buckets = {}
    for name in settings["buckets"]:
        mine = [shard["files"][name] for shard in shards if name in shard["files"]]
        count = sum(file["count"] for file in mine)
        buckets[name] = {"count": count, "shards": [file["file"] for file in mine]}
    manifest = {
        **settings,
        "count": sum(bucket["count"] for bucket in buckets.values()),
        "clips": buckets,
        "refused": _refused(shards),
        "model_name": model,
        "versions": {name: version(name) for name in _PACKAGES},
    }
    write_json(out / MANIFEST, manifest)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
