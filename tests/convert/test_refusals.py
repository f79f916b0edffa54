"""Corrupted inputs, each refused before anything is written, in words that help."""

import json
import os
import pickle
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from convert.load import find_folder
from convert.safetensors_file import read_header
from convert.tensors import Tensors, write_tensors
from convert.to_arrays import import_pipeline
from qvgen_jax.errors import UserError
from tests.convert.pipelines import FILES, INDEX, write_pipeline

BIAS = "proj_out.bias"


def rewrite_header(path: Path, change) -> None:
    """Replaces the header's text by `change(text)`; the tensors' bytes stay."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def rewrite_entry(path: Path, **changes) -> None:
    """Changes one tensor's entry in the header."""

    def change(text: str) -> str:
        fields = json.loads(text)
        name = next(name for name in fields if name != "__metadata__")
        fields[name] |= changes
        return json.dumps(fields)

    rewrite_header(path, change)


def rewrite_index(folder: Path, change) -> None:
    fields = json.loads((folder / INDEX).read_text())
    change(fields["weight_map"])
    (folder / INDEX).write_text(json.dumps(fields))


def only_pickles(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({BIAS: [0.0]}))


def pickle_beside(folder: Path) -> None:
    only_pickles(folder.parent / "vae")


def cut_short(folder: Path) -> None:
    path = folder / FILES[1]
    os.truncate(path, path.stat().st_size - 5)


def shorter_than_its_header(folder: Path) -> None:
    os.truncate(folder / FILES[1], 100)


def header_beyond_the_file(folder: Path) -> None:
    (folder / FILES[0]).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")


def header_of_no_json(folder: Path) -> None:
    rewrite_header(folder / FILES[0], lambda text: text.replace(":", ";", 1))


def overlapping(folder: Path) -> None:
    def change(text: str) -> str:
        fields = json.loads(text)
        fields.pop("__metadata__")
        one, other = sorted(fields.values(), key=lambda entry: entry["data_offsets"])[:2]
        size = other["data_offsets"][1] - other["data_offsets"][0]
        other["data_offsets"] = [one["data_offsets"][1] - 4, one["data_offsets"][1] - 4 + size]
        return json.dumps(fields)

    rewrite_header(folder / FILES[0], change)


def wrong_size(folder: Path) -> None:
    rewrite_entry(folder / FILES[0], shape=[7, 7, 7])


def unknown_type(folder: Path) -> None:
    rewrite_entry(folder / FILES[0], dtype="F4")


def type_of_no_name(folder: Path) -> None:
    rewrite_entry(folder / FILES[0], dtype=["F32"])


def rewrite_metadata(folder: Path, metadata) -> None:
    def change(text: str) -> str:
        return json.dumps(json.loads(text) | {"__metadata__": metadata})

    rewrite_header(folder / FILES[0], change)


def metadata_of_a_list(folder: Path) -> None:
    rewrite_metadata(folder, ["pt"])


def metadata_of_numbers(folder: Path) -> None:
    rewrite_metadata(folder, {"format": 1})


def second_transformer(folder: Path, value) -> None:
    path = folder.parent / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"transformer_2": value}))


def a_second_transformer(folder: Path) -> None:
    second_transformer(folder, ["diffusers", "WanTransformer3DModel"])


def a_second_transformer_of_true(folder: Path) -> None:
    second_transformer(folder, True)


def negative_shape(folder: Path) -> None:
    rewrite_entry(folder / FILES[0], shape=[-1, -4])


def name_given_twice(folder: Path) -> None:
    def change(text: str) -> str:
        name = next(name for name in json.loads(text) if name != "__metadata__")
        entry = json.dumps(json.loads(text)[name])
        return f'{{"{name}": {entry}, {text[1:]}'

    rewrite_header(folder / FILES[0], change)


def index_to_parent(folder: Path) -> None:
    rewrite_index(folder, lambda where: where.update({BIAS: "../vae/x.safetensors"}))


def index_to_absolute(folder: Path) -> None:
    rewrite_index(folder, lambda where: where.update({BIAS: "/tmp/x.safetensors"}))


def index_to_pickle(folder: Path) -> None:
    rewrite_index(folder, lambda where: where.update({BIAS: "model.bin"}))


def link_to_elsewhere(folder: Path) -> None:
    outside = folder.parent.parent / "elsewhere.safetensors"
    (folder / FILES[2]).rename(outside)
    (folder / FILES[2]).symlink_to(outside)


def licence_from_elsewhere(folder: Path) -> None:
    (folder.parent.parent / "secret").write_text("not yours")
    (folder.parent / "NOTICE").symlink_to(folder.parent.parent / "secret")


def folder_from_elsewhere(folder: Path) -> None:
    (folder.parent / "vae").rename(folder.parent.parent / "vae")
    (folder.parent / "vae").symlink_to(folder.parent.parent / "vae")


def file_missing(folder: Path) -> None:
    (folder / FILES[1]).unlink()


def index_disagrees(folder: Path) -> None:
    rewrite_index(folder, lambda where: where.update({BIAS: FILES[FILES.index(where[BIAS]) - 1]}))


def changed_tensor(folder: Path, name: str, change) -> None:
    for file in FILES:
        held = load_file(folder / file)
        if name in held:
            write_tensors(folder / file, held | {name: change(held[name])})


def not_a_number(folder: Path) -> None:
    def change(array):
        array[1, 2] = np.nan
        array[0, 0] = np.inf
        return array

    changed_tensor(folder, "blocks.2.attn1.to_q.weight", change)


def wrong_shape(folder: Path) -> None:
    changed_tensor(folder, "blocks.0.ffn.net.2.weight", lambda array: array.T)


def integers(folder: Path) -> None:
    changed_tensor(folder, "blocks.0.ffn.net.2.weight", lambda array: array.astype(np.int32))


def layers_of_two_types(folder: Path) -> None:
    changed_tensor(folder, "blocks.1.ffn.net.2.weight", lambda array: array.astype(np.float16))


def names_of_another_model(folder: Path) -> None:
    def change(where):
        for name in [name for name in where if name.endswith("norm2.weight")]:
            where[name.replace("norm2", "norm9")] = where.pop(name)

    for file in FILES:
        rewrite_header(folder / file, lambda text: text.replace("norm2.weight", "norm9.weight"))
    rewrite_index(folder, change)


def another_family(folder: Path) -> None:
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"_class_name": "FluxTransformer"}))


CORRUPTIONS = [
    (only_pickles, r"is a pickle, .* runs whatever code .*save_file\(torch.load"),
    (pickle_beside, r"vae/diffusion_pytorch_model.bin is a pickle"),
    (cut_short, r"00002-of.* header and tensors take \d+ bytes, the file has \d+; fetch it again"),
    (shorter_than_its_header, r"100 bytes do not hold a header of \d+ bytes"),
    (header_beyond_the_file, r"10 bytes do not hold a header of 1099511627776 bytes"),
    (header_of_no_json, r"its header is no JSON object with unique names"),
    (overlapping, r"overlaps what lies before it"),
    (wrong_size, r"\[7, 7, 7\] takes 1372 bytes, its data_offsets span \d+"),
    (unknown_type, r"unknown type 'F4'"),
    (type_of_no_name, r"unknown type \['F32'\]"),
    (metadata_of_a_list, r"its __metadata__ is not an object of strings"),
    (metadata_of_numbers, r"its __metadata__ is not an object of strings"),
    (a_second_transformer, r"holds a WanPipeline with transformer_2"),
    (a_second_transformer_of_true, r"transformer_2: True, expected null or \[library, class\]"),
    (negative_shape, r"not whole numbers from 0"),
    (name_given_twice, r"given twice"),
    (index_to_parent, r"names files outside its folder: \.\./vae/x\.safetensors"),
    (index_to_absolute, r"names files outside its folder: /tmp/x\.safetensors"),
    (index_to_pickle, r"names files outside its folder: model\.bin"),
    (link_to_elsewhere, r"is a link to .*elsewhere.safetensors, outside its folder"),
    (licence_from_elsewhere, r"NOTICE is a link to .*secret, outside its folder"),
    (folder_from_elsewhere, r"source/vae is a link; put the folder itself there"),
    (file_missing, r"00002-of-00003.safetensors does not read \(No such file"),
    (index_disagrees, r"disagree: proj_out.bias is not in .*holds proj_out.bias unknown to it"),
    (not_a_number, r"blocks.2.attn1.to_q.weight holds 2 values that are NaN or infinite"),
    (wrong_shape, r"blocks.0.ffn.net.2.weight is \[35, 24\], expected \[24, 35\]"),
    (integers, r"blocks.0.ffn.net.2.weight is I32, expected one of F32, BF16, F16"),
    (layers_of_two_types, r"blocks.1.ffn.net.2.weight is F16, its first layer F32"),
    (
        names_of_another_model,
        r"3 tensors missing \[blocks.\{0-2\}.norm2.weight\], "
        r"3 unexpected \[blocks.\{0-2\}.norm9.weight\]",
    ),
    (another_family, r"FluxTransformer; supported are WanTransformer3DModel"),
]


@pytest.mark.parametrize(
    ("corrupt", "message"), CORRUPTIONS, ids=[corrupt.__name__ for corrupt, _ in CORRUPTIONS]
)
def test_a_corrupted_input_is_refused_clearly(tmp_path, tensors, corrupt, message):
    source = write_pipeline(tmp_path / "source", tensors)
    corrupt(source / "transformer")
    with pytest.raises(UserError, match=message) as caught:
        import_pipeline(source, tmp_path / "target")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "target").exists()
    # Only NaN is found while the tensors stream by; all else before anything is written.
    assert (tmp_path / "target.partial").exists() == (corrupt is not_a_number)


def test_every_culprit_is_named_at_once(tmp_path, tensors):
    folder = write_pipeline(tmp_path / "source", tensors) / "transformer"
    wrong_shape(folder)
    integers_in = "blocks.2.attn2.to_k.bias"
    changed_tensor(folder, integers_in, lambda array: array.astype(np.int64))
    layers = ["blocks.0.attn1.norm_q.weight", "blocks.1.attn1.norm_q.weight"]
    for name in layers:
        changed_tensor(folder, name, lambda array: array[:-1])
    with pytest.raises(UserError) as caught:
        import_pipeline(tmp_path / "source", tmp_path / "target")
    for culprit in ("blocks.0.ffn.net.2.weight", integers_in, "blocks.{0-1}.attn1.norm_q.weight"):
        assert culprit in str(caught.value)


def test_the_hub_cache_may_link_to_its_blobs(tmp_path, tensors):
    repository = tmp_path / "models--owner--name"
    source = write_pipeline(repository / "snapshots" / "abc", tensors)
    (repository / "blobs").mkdir()
    for i, path in enumerate([source / "transformer" / FILES[0], source / "README.md"]):
        path.rename(repository / "blobs" / str(i))
        path.symlink_to(repository / "blobs" / str(i))
    import_pipeline(source, tmp_path / "target")
    assert (tmp_path / "target" / "README.md").read_text() == "# the model card"
    assert not (tmp_path / "target" / "README.md").is_symlink()


def test_a_pickle_given_as_the_source_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    with pytest.raises(UserError, match="is a pickle"):
        find_folder(tmp_path / "model.ckpt")


def test_a_variant_beside_the_plain_file_is_left_alone(tmp_path):
    write_tensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    write_tensors(tmp_path / "model.fp16.safetensors", {"a": np.zeros(2, np.float16)})
    assert Tensors(tmp_path)["a"].dtype == np.float32
    write_tensors(tmp_path / "other.safetensors", {"b": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"holds 3 .* remove what does not belong there"):
        Tensors(tmp_path)


FP16_INDEX = "model.fp16.safetensors.index.json"
FP16_SHARDS = {
    "today's names": "model.fp16-{:05}-of-00002.safetensors",
    "diffusers' old names": "model-{:05}-of-00002.fp16.safetensors",
    "names without the variant": "model-{:05}-of-00002.safetensors",
}


def write_shards(folder: Path, index: str, shards: str, value: np.ndarray) -> None:
    """Tensors a and b of one value in a file each, and their index."""
    where = {"a": shards.format(1), "b": shards.format(2)}
    for name, file in where.items():
        write_tensors(folder / file, {name: value})
    (folder / index).write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", list(FP16_SHARDS.values())[:2], ids=list(FP16_SHARDS)[:2])
def test_a_variants_index_beside_the_plain_file_is_left_alone(tmp_path, shards):
    write_tensors(tmp_path / "model.safetensors", {"a": np.ones(2, np.float32)})
    write_shards(tmp_path, FP16_INDEX, shards, np.zeros(2, np.float16))
    tensors = Tensors(tmp_path)
    assert tensors.index is None
    assert {name: array.dtype for name, array in tensors.items()} == {"a": np.float32}


@pytest.mark.parametrize("shards", list(FP16_SHARDS.values())[:2], ids=list(FP16_SHARDS)[:2])
def test_a_variants_index_beside_the_plain_index_is_left_alone(tmp_path, shards):
    plain = "model.safetensors.index.json"
    write_shards(tmp_path, plain, "model-{:05}-of-00002.safetensors", np.ones(2, np.float32))
    write_shards(tmp_path, FP16_INDEX, shards, np.zeros(2, np.float16))
    tensors = Tensors(tmp_path)
    assert tensors.index == tmp_path / plain
    assert {array.dtype for array in tensors.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("shards", FP16_SHARDS.values(), ids=FP16_SHARDS)
def test_a_variants_index_alone_is_read(tmp_path, shards):
    write_shards(tmp_path, FP16_INDEX, shards, np.zeros(2, np.float16))
    tensors = Tensors(tmp_path)
    assert tensors.index == tmp_path / FP16_INDEX
    assert set(tensors) == {"a", "b"}
    assert tensors["b"].dtype == np.float16


def test_of_two_variants_alone_neither_is_chosen(tmp_path):
    for kind, value in (("bf16", np.ones(2, ml_dtypes.bfloat16)), ("fp16", np.ones(2, np.float16))):
        shards = f"model.{kind}-{{:05}}-of-00002.safetensors"
        write_shards(tmp_path, f"model.{kind}.safetensors.index.json", shards, value)
    named = "holds 2 models: model.bf16.safetensors.*, model.fp16.safetensors.*; keep one of them"
    with pytest.raises(UserError, match=named):
        Tensors(tmp_path)


def test_headers_are_read_as_the_safetensors_library_writes_them(tmp_path):
    arrays = {
        "scalar": np.float32(3),
        "empty": np.zeros((0, 4), np.float16),
        "bytes": np.arange(7, dtype=np.uint8),
        "flags": np.array([True, False]),
        "a ü": np.ones((2, 3), np.int64),
    }
    write_tensors(tmp_path / "model.safetensors", arrays)
    tensors = Tensors(tmp_path)
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    assert len(read_header(tmp_path / "model.safetensors").tensors) == 5
