"""Mutated JSON files of model folders, exports and encoded clips: refused, or read as they say."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from convert.array_tree import read_manifest
from convert.load import check_index, read_text_encoder, read_transformer, read_vae
from convert.tensors import read_json
from qvgen_jax.data.dataset import EncodedDataset
from qvgen_jax.data.encode import encode_folder
from qvgen_jax.diffusion.schedulers import make_schedule, scheduler_from_json
from qvgen_jax.generation_config import generation_defaults
from qvgen_jax.models import config_from_json
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.packed import quantization_config, read_quantization_config
from tests.data.test_encoded_dataset import CUT, AveragingPipeline
from tests.fuzz.campaign import generators, tried
from tests.fuzz.mutations import mutated_bytes, mutated_json

TINY = Path(__file__).parents[2] / "assets/tiny_wan"
QUANT = QuantConfig(3, 4, bits={"blocks.attn1.to_q": (8, 8)}, rank=0, full_precision=("proj_out",))


def raw(good: object, rng) -> bytes:
    """A mutated file: of what it says, or of its bytes."""
    if rng.random() < 0.15:
        return mutated_bytes(json.dumps(good).encode(), rng)
    return json.dumps(mutated_json(good, rng)).encode()


def read_index(fields: dict, path: Path) -> None:
    assert check_index(path.parent) == fields["_class_name"]


def read_generation(fields: dict, path: Path) -> None:
    config = config_from_json(read_json(TINY / "transformer/config.json"))
    defaults = generation_defaults(fields, config, 16, str(path))
    assert {name: defaults[name] for name in fields} == fields
    assert all(type(value) in (int, float) for value in defaults.values())


def read_scheduler(fields: dict, path: Path) -> None:
    schedule = make_schedule(scheduler_from_json(fields), 4)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(schedule))


def read_quantization(fields: dict, path: Path) -> None:
    config = read_quantization_config(fields)
    again = quantization_config(config)
    assert read_quantization_config(again) == config
    assert config.weight_bits == fields["bits"]["weights"]


def read_arrays(fields: dict, path: Path) -> None:
    assert read_manifest(path.parent) == fields


READERS = {
    "model_index.json": (read_index, read_json(TINY / "model_index.json")),
    "generation_config.json": (read_generation, read_json(TINY / "generation_config.json")),
    "scheduler_config.json": (
        read_scheduler,
        read_json(TINY / "scheduler/scheduler_config.json"),
    ),
    "quantization_config.json": (read_quantization, quantization_config(QUANT)),
    "arrays.json": (
        read_arrays,
        {
            "format_version": 1,
            "files": {"a.safetensors": "{}"},
            "sha256": {"a": "00"},
            "index": None,
            "leaves": {"proj_out.kernel": {"shape": [4, 6], "dtype": "float32"}},
        },
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mutated_file_of_a_folder_is_refused_or_read_as_it_says(tmp_path, name):
    read, good = READERS[name]
    for _, rng in generators(name, 30):
        path = tmp_path / name
        path.write_bytes(raw(good, rng))
        with tried("folders' JSON"):
            read(read_json(path), path)


COMPONENTS = {
    "transformer": lambda folder: read_transformer(folder, np.dtype(np.float32)).states,
    "vae": lambda folder: read_vae(folder).states,
    "text_encoder": lambda folder: read_text_encoder(folder, np.dtype(np.float32)).states,
}


@pytest.mark.parametrize("name", COMPONENTS)
def test_a_component_with_a_mutated_config_is_refused_or_has_the_weights_of_its_file(
    tmp_path, name
):
    folder = shutil.copytree(TINY / name, tmp_path / name)
    good = read_json(folder / "config.json")
    before = jax.tree.leaves(COMPONENTS[name](folder))
    for label, rng in generators(name, 3):
        (folder / "config.json").write_bytes(raw(good, rng))
        with tried("components"):
            found = jax.tree.leaves(COMPONENTS[name](folder))
            assert all(map(np.array_equal, found, before)), label


def test_a_mutated_encoding_is_refused_or_holds_clips(tmp_path):
    out = tmp_path / "encoded"
    clips = Path(__file__).parents[2] / "assets/clips"
    source = tmp_path / "videos"
    source.mkdir()
    for name in ("00000.mp4", "00001.mp4"):
        shutil.copy(clips / name, source)
    (source / "captions.jsonl").write_text(
        "".join(f'{{"file": "{i:05}.mp4", "caption": "a star"}}\n' for i in range(2))
    )
    encode_folder(AveragingPipeline(), source, out, cut=CUT)
    shutil.copy(out / "clips-00000-5x32x48.array_record", tmp_path / "outside.array_record")
    good = {path: path.read_bytes() for path in out.iterdir()}
    for label, rng in generators("encoded clips", 20):
        path = rng.choice([out / "manifest.json", out / "manifest.json", *good])
        if path.suffix == ".array_record":
            continue
        mutated = path.name == "manifest.json" and rng.random() < 0.8
        path.write_bytes(
            raw(json.loads(good[path]), rng) if mutated else mutated_bytes(good[path], rng)
        )
        try:
            with tried("encoded clips"):
                dataset = EncodedDataset(out)
                assert len(dataset) == 2, label
                assert dataset[1]["latent_mean"].shape == (2, 4, 6, 3)
                assert dataset.empty_text_embeds.ndim == 2
        finally:
            path.write_bytes(good[path])
