"""Videos and captions to shards of latents and text embeddings, once, before training.

A folder of encoded clips holds

    settings.json            what it was made from and with; a run with other settings is refused
    clips-00000.array_record one record per clip: `latent_mean`, `latent_logvar` (float32
                             `[f, h, w, c]`, in the transformer's normalised space), `text_embeds`
                             `[tokens, dim]` without padding, `caption`, `source`
    clips-00000.json         how many clips the shard holds, which videos were refused and why
    empty_text_embeds.msgpack  the empty prompt, for caption dropout
    refused.jsonl            one line {"file", "reason"} per video that was set aside
    manifest.json            all of it in one place; written last, so its presence means "complete"

The posterior is stored, not a sample of it, so that every epoch draws its own latents.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from qvgen_jax.components import fingerprint
from qvgen_jax.data.captions import CaptionedFile, read_captions
from qvgen_jax.data.records import pack
from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object

if TYPE_CHECKING:
    from qvgen_jax.pipeline import Pipeline

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
EMPTY_TEXT = "empty_text_embeds.msgpack"
REFUSED = "refused.jsonl"


def encode_folder(
    pipe: "Pipeline",
    source: str | Path,
    out: str | Path,
    *,
    num_frames: int,
    height: int,
    width: int,
    max_length: int | None = None,
    shard_size: int = 256,
    batch_size: int = 8,
    most_refused: float = 1.0,
    retry: bool = True,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Encodes a folder of videos; the same call again continues where it stopped.

    Videos are scaled and centre-cropped to the size. A longer one is thinned to every
    `frames // num_frames`-th frame, as in the release's data loader; a shorter one, or one that
    does not decode, is set aside with its reason.

    Args:
        pipe: gives `vae_posterior` and `encode_prompt`.
        source: the folder of videos with their captions file, see `captions.read_captions`.
        out: the folder to write to.
        num_frames, height, width: of every clip, in frames and pixels.
        max_length: text tokens; by default the pipeline's own.
        shard_size: clips per file.
        batch_size: clips per call of the VAE.
        most_refused: share of the videos that may be set aside.
        retry: whether to try again those of finished shards that were replaced since.
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
        "num_frames": num_frames,
        "height": height,
        "width": width,
        "max_length": pipe.defaults["max_length"] if max_length is None else max_length,
        "shard_size": shard_size,
    }
    _claim(out, settings)
    shards, changed = [], not (out / MANIFEST).exists()
    for start in range(0, len(entries), shard_size):
        file = out / f"clips-{start // shard_size:05d}.array_record"
        shard = _finished_shard(source, file, retry)
        if shard is None:
            mine = entries[start : start + shard_size]
            shard, changed = _write_shard(pipe, source, file, mine, settings, batch_size), True
            for name, reason in shard["refused"].items():
                log(f"set aside {name}: {reason}")
            log(f"encoded {start + len(mine)} of {len(entries)} videos")
        shards.append(shard)
        _check_refused(out, shards, len(entries), most_refused)
    if not changed:
        return read_object(out / MANIFEST, "delete it, and encode again")
    return _write_manifest(pipe, out, settings, shards)


def _claim(out: Path, settings: dict) -> None:
    """Makes `out` the folder of an encoding with these settings."""
    path = out / "settings.json"
    if not path.exists():
        out.mkdir(parents=True, exist_ok=True)
        _write_json(path, settings)
        return
    before = read_object(path, f"delete {out}, and encode again")
    changed = [key for key in settings if before.get(key) != settings[key]]
    if changed:
        differences = ", ".join(f"{k} {before.get(k)!r} -> {settings[k]!r}" for k in changed)
        raise UserError(
            f"{out} holds clips encoded with other settings ({differences}): "
            "delete that folder or encode to another"
        )


def _check_refused(out: Path, shards: Sequence[dict], total: int, most: float) -> None:
    """Lists what was set aside so far, and ends it where that is too much already."""
    refused = _refused(shards)
    rows = ({"file": name, "reason": reason} for name, reason in refused.items())
    _replace(out / REFUSED, "".join(json.dumps(row) + "\n" for row in rows))
    if len(refused) <= most * total and len(refused) < total:
        return
    reasons = list(refused.values())
    shown = "; ".join(reasons[:3]) + (f"; all are in {out / REFUSED}" if len(reasons) > 3 else "")
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


def _refused(shards: Sequence[dict]) -> dict[str, str]:
    return {name: reason for shard in shards for name, reason in shard["refused"].items()}


def _finished_shard(source: Path, file: Path, retry: bool) -> dict | None:
    """A shard's description if it is finished and, to `retry`, no refused video was replaced."""
    described = file.with_suffix(".json")
    if not described.exists():
        return None
    shard = read_object(described, "delete it, and encode again")
    if not retry:
        return shard
    replaced = any(_stamp(source / name) != shard["stamps"][name] for name in shard["refused"])
    return None if replaced else shard


def _write_shard(
    pipe: "Pipeline",
    source: Path,
    file: Path,
    entries: Sequence[CaptionedFile],
    settings: dict,
    batch_size: int,
) -> dict:
    part = file.with_suffix(".part")
    refused: dict[str, str] = {}
    count = 0
    # group_size 1: records are read one at a time, in random order.
    writer = ArrayRecordWriter(str(part), "group_size:1")
    for first in range(0, len(entries), batch_size):
        batch = entries[first : first + batch_size]
        for record in _encode_batch(pipe, source, batch, settings, batch_size, refused):
            writer.write(pack(record))
            count += 1
    writer.close()
    os.replace(part, file)
    stamps = {name: _stamp(source / name) for name in refused}
    shard = {"file": file.name, "count": count, "refused": refused, "stamps": stamps}
    _write_json(file.with_suffix(".json"), shard)
    return shard


def _stamp(path: Path) -> list[int] | None:
    if not path.is_file():
        return None
    stat = path.stat()
    return [stat.st_size, stat.st_mtime_ns]


def _encode_batch(
    pipe: "Pipeline",
    source: Path,
    batch: Sequence[CaptionedFile],
    settings: dict,
    batch_size: int,
    refused: dict[str, str],
) -> list[dict]:
    """The records of the videos that can be read; adds the others to `refused`."""
    good, videos = [], []
    with ThreadPoolExecutor(4) as pool:
        for entry, video in zip(
            batch, pool.map(lambda e: _read_clip(source / e.file, settings), batch), strict=True
        ):
            if isinstance(video, UserError):
                refused[entry.file] = str(video)
            else:
                good.append(entry)
                videos.append(video)
    if not good:
        return []
    padded = videos + [videos[-1]] * (batch_size - len(videos))  # One shape, one compilation.
    mean, logvar = pipe.vae_posterior(np.stack(padded).astype(np.float32) / 127.5 - 1.0)
    texts = pipe.encode_prompt([entry.caption for entry in good], settings["max_length"])
    mean, logvar, texts = np.asarray(mean), np.asarray(logvar), np.asarray(texts)
    return [
        {
            "latent_mean": mean[i].astype(np.float32),
            "latent_logvar": logvar[i].astype(np.float32),
            "text_embeds": _without_padding(texts[i]),
            "caption": entry.caption,
            "source": entry.file,
        }
        for i, entry in enumerate(good)
    ]


def _read_clip(path: Path, settings: dict) -> np.ndarray | UserError:
    """uint8 `[num_frames, height, width, 3]`, or the reason why not."""
    wanted = settings["num_frames"]
    try:
        video = read_video(path, cover=(settings["height"], settings["width"]))
    except UserError as error:
        return error
    if len(video) < wanted:
        return UserError(f"{path} has {len(video)} frames, needed are {wanted}: use longer videos")
    return video[:: len(video) // wanted][:wanted]


def _without_padding(text: np.ndarray) -> np.ndarray:
    """`[tokens, dim]` up to the last row that is not zero; the encoder zeroes what pads."""
    rows = np.flatnonzero(text.any(axis=-1))
    return text[: rows[-1] + 1 if len(rows) else 1]


def _write_manifest(pipe: "Pipeline", out: Path, settings: dict, shards: list[dict]) -> dict:
    refused, count = _refused(shards), sum(shard["count"] for shard in shards)
    empty = np.asarray(pipe.encode_prompt([""], settings["max_length"]))[0]
    (out / EMPTY_TEXT).write_bytes(pack({"text_embeds": _without_padding(empty)}))
    files = [shard["file"] for shard in shards if shard["count"]]
    manifest = {**settings, "count": count, "shards": files, "refused": refused}
    _write_json(out / MANIFEST, manifest)
    return manifest


def _write_json(path: Path, content: dict) -> None:
    _replace(path, json.dumps(content, indent=2) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
