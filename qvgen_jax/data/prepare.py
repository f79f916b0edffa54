"""The clips of a run: found encoded where the config says, made there first, or on the fly."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import jax

from qvgen_jax import hosts, storage
from qvgen_jax.data.clips import Cut, cut_of
from qvgen_jax.data.dataset import Dataset, EncodedDataset
from qvgen_jax.data.encode import FORMAT_VERSION, MANIFEST, encode_folder
from qvgen_jax.data.live import LiveDataset
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.request import latent_size

if TYPE_CHECKING:
    from qvgen_jax.pipeline import Pipeline

LIVE = "clips_on_the_fly.json"


def check_source(config: Mapping, workdir: str | Path) -> None:
    """See that there are videos, or encoded clips, before a model is fetched for them.

    Raises:
        UserError: `data.source` is empty or no folder, and nothing is encoded yet; or clips are to
            be encoded to an address.
    """
    data = config["data"]
    if data["on_the_fly"]:
        _check_on_the_fly(data)
    elif (_encoded(config, workdir) / MANIFEST).is_file():
        return
    if storage.is_remote(data["encoded"]):
        raise UserError(
            f"{data['encoded']} holds no finished encoding, and clips are encoded to folders: "
            "leave config.data.encoded empty, so that they go where the run lives, or copy them "
            "there"
        )
    if not data["source"]:
        raise UserError(
            "config.data.source is empty: give the folder of your videos and their captions, "
            "--config.data.source=FOLDER"
        )
    if storage.is_remote(data["source"]) and str(data["source"]).endswith((".jsonl", ".csv")):
        raise UserError(f"{data['source']} is a file in a bucket: name the folder that it is in")
    if not storage.local(data["source"]).exists():
        raise UserError(
            f"data folder {data['source']} does not exist; give the folder of the videos, or a "
            ".jsonl or .csv file that lists them"
        )


def _check_on_the_fly(data: Mapping) -> None:
    if data["encoded"]:
        raise UserError(
            f"data.on_the_fly encodes nothing beforehand, but data.encoded={data['encoded']!r} "
            "names a folder for it: leave one of them out"
        )
    if jax.device_count() > 1:
        raise UserError(
            f"data.on_the_fly is for a run on one device, here are {jax.device_count()}: leave it "
            "out, and clips are encoded once before training"
        )


def check_sizes(config: Mapping, pipe: "Pipeline") -> None:
    """See that clips of every size divide into what the VAE and the transformer take.

    Raises:
        UserError: one does not; the nearest that does is named.
    """
    vae, patch = pipe.vae.config, pipe.transformer.config.patch_size
    sizes = cut_of(config["data"]).sizes
    if config["evaluate"]["held_out"]:
        sizes += cut_of(_held_out(config, "")["data"]).sizes
    for size in sizes:
        try:
            latent_size(*size, vae.temporal_factor, vae.temporal_factor, vae.spatial_factor, patch)
        except UserError as error:
            raise UserError(f"clips of {size}: {error}") from error


def _encoded(config: Mapping, workdir: str | Path) -> Path:
    return storage.local(config["data"]["encoded"] or Path(workdir) / "encoded")


def ensure_encoded(config: Mapping, workdir: str | Path, pipe: "Pipeline") -> Path:
    """The folder of encoded clips for `config.data`, complete; encodes what is missing.

    Videos that cannot be used are set aside with their reason, in `refused.jsonl` there, and the
    run goes on with the others, unless they are more than a share `data.most_refused` of all. Where
    only the encoded clips were copied to a machine, they are used as they are.

    Args:
        config: reads `model` and `data.source`, `encoded` ("" means inside the workdir),
            `max_length`, `encode_batch_size`, `most_refused`, and what `clips.cut_of` reads.
        workdir: of the run.
        pipe: whose VAE and text encoder make the clips.

    Raises:
        UserError: no data path, clips of another size or model, or too many videos that cannot be
            used; the others are encoded by then, and stay.
    """
    data = config["data"]
    encoded = _encoded(config, workdir)
    cut = cut_of(data)
    source = storage.local(data["source"]) if data["source"] else None
    finished = hosts.agreed((encoded / MANIFEST).is_file())
    if finished and not hosts.agreed(bool(source and source.exists())):
        _check_cut(encoded, cut, data["max_length"])
        return encoded
    check_source(config, workdir)
    batch_size = data["encode_batch_size"]
    # What a run has begun without stays away, or its order of clips would be another one's.
    begun = (Path(workdir) / "config.json").is_file()
    encode_folder(
        pipe,
        source,
        encoded,
        cut=cut,
        max_length=data["max_length"],
        batch_size=batch_size,
        most_refused=data["most_refused"],
        retry=not begun,
        model=str(config["model"]),
    )
    return encoded


def read_dataset(config: Mapping, workdir: str | Path, pipe: "Pipeline") -> Dataset:
    """The clips to train on, as `config.data` says: `ensure_encoded`, or `on_the_fly`.

    Raises:
        UserError: as `ensure_encoded`; or a run on the fly that would go on with other clips.
    """
    data = config["data"]
    if not data["on_the_fly"]:
        return EncodedDataset(ensure_encoded(config, workdir, pipe), data["max_length"])
    check_source(config, workdir)
    dataset = LiveDataset(
        pipe,
        storage.local(data["source"]),
        cut=cut_of(data),
        max_length=data["max_length"],
        most_refused=data["most_refused"],
    )
    _check_same(Path(workdir) / LIVE, dataset, data["source"])
    return dataset


def _check_same(path: Path, dataset: LiveDataset, source: str) -> None:
    """See that a run goes on with the clips that it began with; its first start notes them."""
    now = {"clips": len(dataset), "digest": dataset.digest()}
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, now)
    elif read_object(path, "put it back, or start anew with another --workdir") != now:
        raise UserError(
            f"the videos of {source} give other clips than those that {path.parent} began with, "
            "and so another order: put them back, or start anew with another --workdir"
        )


def _held_out(config: Mapping, workdir: str | Path) -> dict:
    """The config with its held-out clips in the place of those to train on."""
    evaluate = config["evaluate"]
    encoded = evaluate["held_out_encoded"] or str(Path(workdir) / "held_out")
    # Compared as one array: of one size, and one clip of each video.
    same = {"buckets": (), "clips_per_video": 1, "crop": "centre", "on_the_fly": False}
    data = {**config["data"], **same, "source": evaluate["held_out"], "encoded": encoded}
    return {**config, "data": data}


def check_held_out(config: Mapping, workdir: str | Path) -> None:
    """`check_source` of the clips that `evaluate.held_out` names, if any.

    Raises:
        UserError: the folder does not exist.
    """
    if config["evaluate"]["held_out"]:
        check_source(_held_out(config, workdir), workdir)


def ensure_held_out(config: Mapping, workdir: str | Path, pipe: "Pipeline") -> Path:
    """`ensure_encoded` of the held-out clips: `evaluate.held_out`, in the training clips' size."""
    return ensure_encoded(_held_out(config, workdir), workdir, pipe)


def _check_cut(encoded: Path, cut: Cut, max_length: int) -> None:
    manifest = read_object(encoded / MANIFEST, "delete the folder and encode again")
    if manifest.get("format_version") != FORMAT_VERSION:
        return  # Who reads it says so.
    asked = {
        "buckets": [str(size) for size in cut.sizes],
        "fps": cut.fps,
        "clips_per_video": cut.most,
        "crop": cut.crop,
        "max_length": max_length,
    }
    for name, value in asked.items():
        if (found := manifest.get(name)) != value:
            raise UserError(
                f"{encoded} holds clips with {name} {found}, config.data asks for {value}: set it "
                "to what is there, or give the videos as config.data.source"
            )
