"""Export of a small transformer: what is on disk, and that it computes what was trained."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import wan_transformer
from convert.export import export_pipeline
from convert.load import read_default_steps, read_transformer
from convert.names import to_torch
from convert.save import write_json
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import TEXT_ONLY, WanConfig, WanTransformer, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.transformer import Transformer
from tests.compiling import optimized
from tests.golden.tiny_models import WAN_ODD

ASSET = Path(__file__).parents[2] / "assets" / "tiny_wan" / "transformer" / "config.json"
SMALL = WanConfig(**WAN_ODD)


def student(model: WanConfig, quant: QuantConfig) -> Transformer:
    """The training form of the network around random parameters, quantized."""
    plain = WanTransformer(model, key=jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    params, levels = quantize_params(params, quantizable(model), quant)
    network = nnx.eval_shape(
        lambda: WanTransformer(
            model,
            key=jax.random.key(0),
            dense=dense_factory(quant, "train"),
            clip_mode=quant.clip_index,
            buckets=quant.buckets,
        )
    )
    graphdef = nnx.split(network, nnx.Param, Levels)[0]
    return Transformer(model, graphdef, (params, levels))


def pipeline_folder(folder: Path, model: WanConfig) -> Path:
    """A source with a transformer's config and one other part."""
    fields = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(model)}
    write_json(folder / "transformer" / "config.json", fields)
    write_json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    write_json(folder / "vae" / "config.json", {"z_dim": 4})
    return folder


def inputs(model: WanConfig):
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (2, 3, 4, 6, model.in_channels))
    return latents, jnp.asarray([1000.0, 331.0]), jax.random.normal(keys[1], (2, 5, model.text_dim))


def assert_bits_equal(loaded: Transformer, trained: Transformer) -> None:
    found, expected = (optimized(lambda *x, of=each: of(*x)) for each in (loaded, trained))
    np.testing.assert_array_equal(found(*inputs(SMALL)), expected(*inputs(SMALL)))


@pytest.fixture(scope="module")
def params():
    return student(SMALL, QuantConfig(rank=0)).states[0]


@pytest.mark.parametrize(
    ("bits", "product_dtype"),
    [pytest.param(4, "bfloat16", marks=pytest.mark.slow), (3, "int8")],
)
def test_the_export_computes_bit_for_bit_what_was_trained(tmp_path, bits, product_dtype):
    quant = QuantConfig(
        bits,
        bits,
        rank=0,
        bits={"proj_out": (8, 8)},
        single_clip=TEXT_ONLY,
        product_dtype=product_dtype,
    )
    trained = student(SMALL, quant)
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, trained.states[0], quant)
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32)
    assert_bits_equal(loaded, trained)
    assert read_json(tmp_path / "export" / "vae" / "config.json") == {"z_dim": 4}


@pytest.mark.slow
def test_symmetric_weights_are_exported_without_zero_points(tmp_path):
    quant = QuantConfig(rank=0, single_clip=TEXT_ONLY, symmetric_weights=True)
    trained = student(SMALL, quant)
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, trained.states[0], quant)
    assert not [n for n in Tensors(tmp_path / "export" / "transformer") if "zero_point" in n]
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32)
    assert_bits_equal(loaded, trained)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("blocks.1.norm2.weight", slice(23)),
        ("patch_embedding.weight", slice(23)),
        ("scale_shift_table", np.s_[:, :, :23]),
        ("condition_embedder.time_proj.weight", slice(143)),
        ("blocks.1.attn1.to_q.scale", slice(23)),
    ],
)
def test_a_tensor_of_another_size_is_refused(tmp_path, name, kept):
    quant = QuantConfig(rank=0, full_precision=("condition_embedder.time_proj",))
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, student(SMALL, quant).states[0], quant)
    folder = tmp_path / "export" / "transformer"
    tensors = dict(Tensors(folder))
    tensors[name] = np.ascontiguousarray(tensors[name][kept])
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(UserError, match=rf"^{re.escape(name)} is .* expected .* by config.json"):
        read_transformer(folder, jnp.float32)


def test_the_way_of_sampling_ships_with_the_export(tmp_path, params):
    source = pipeline_folder(tmp_path / "source", SMALL)
    for there, unguided, expected in (
        ({}, 4, {"unguided_steps": 4}),
        ({}, 0, {}),
        ({"unguided_steps": 4}, 6, {"unguided_steps": 6}),
        ({"unguided_steps": 4}, 0, {}),
    ):
        write_json(source / "generation_config.json", {"steps": 20, **there})
        generation = {"unguided_steps": unguided}
        export_pipeline(source, tmp_path / "export", SMALL, params, QuantConfig(rank=0), generation)
        written = read_json(tmp_path / "export" / "generation_config.json")
        assert written == {"steps": 20, **expected}


def test_steps_without_guidance_are_some_of_the_steps(tmp_path):
    path = tmp_path / "generation_config.json"
    for unguided in (0, 20):
        write_json(path, {"steps": 20, "unguided_steps": unguided})
        assert read_default_steps(tmp_path, SMALL) == 20
    write_json(path, {"steps": 20, "unguided_steps": 21})
    message = rf"unguided_steps is 21 in {re.escape(str(path))}, expected at most 20"
    with pytest.raises(UserError, match=message):
        read_default_steps(tmp_path, SMALL)


@pytest.mark.slow
def test_a_rotated_model_is_exported_as_it_was_trained(tmp_path):
    folded = {"blocks.attn1.to_out": ("blocks.attn1.to_v", SMALL.attention_head_dim)}
    quant = QuantConfig(rank=0, rotation="hadamard", folded=folded)
    trained = student(SMALL, quant)
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, trained.states[0], quant)
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32)
    assert_bits_equal(loaded, trained)
    config = read_json(tmp_path / "export" / "transformer" / "config.json")["quantization_config"]
    assert config["format_version"] == 3
    assert config["rotation"] == {"kind": "hadamard", "largest_block": 256}
    assert config["folded"]["blocks.attn1.to_out"] == {
        "into": "blocks.attn1.to_v",
        "head_width": 12,
    }


def test_released_behaviour_and_full_precision_layers_survive_the_export(tmp_path):
    quant = QuantConfig.released(rank=0, full_precision=("condition_embedder.time_proj",))
    trained = student(SMALL, quant)
    params = trained.states[0]
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, params, quant)
    loaded = read_transformer(tmp_path / "export" / "transformer", jnp.float32)
    # The layer in full precision is stored as bfloat16: so is the one compared with.
    kernel = params["condition_embedder"]["time_proj"]["kernel"]
    params["condition_embedder"]["time_proj"]["kernel"] = kernel.astype(jnp.bfloat16)
    assert_bits_equal(loaded, trained)


def test_quantized_linears_of_the_tiny_pipeline_take_thirty_percent_of_bfloat16(tmp_path):
    model = WanConfig.from_json(json.loads(ASSET.read_text()))
    quant = QuantConfig(rank=0)
    network = WanTransformer(model, key=jax.random.key(0), dense=dense_factory(quant, "train"))
    params = nnx.to_pure_dict(nnx.state(network, nnx.Param))
    source = pipeline_folder(tmp_path / "source", model)
    export_pipeline(source, tmp_path / "export", model, params, quant)
    tensors = Tensors(tmp_path / "export" / "transformer")
    leaves = ("codes", "scale", "zero_point", "clips")
    packed = sum(a.nbytes for n, a in tensors.items() if n.rsplit(".", 1)[-1] in leaves)
    plain = to_torch(wan_transformer.name_table(model), params)
    stems = {n.rsplit(".", 1)[0] for n in tensors if n.endswith(".codes")}
    assert len(stems) == 6 + 10 * model.num_layers
    assert packed <= 0.30 * sum(2 * plain[f"{stem}.weight"].size for stem in stems)
    assert tensors["blocks.5.attn1.to_out.0.codes"].shape == (128, 64)


def test_licence_and_model_card_travel_with_the_export_and_arrays_do_not(tmp_path, params):
    source = pipeline_folder(tmp_path / "source", SMALL)
    for name in ("LICENSE", "README.md", "transformer/NOTICE"):
        (source / name).write_text(name)
    (source / "transformer" / "arrays").mkdir()
    for name in ("arrays/manifest.ocdbt", "arrays.json"):
        (source / "transformer" / name).write_text("of an import")
    export_pipeline(source, tmp_path / "export", SMALL, params, QuantConfig(rank=0))
    for name in ("LICENSE", "README.md", "transformer/NOTICE"):
        assert (tmp_path / "export" / name).read_text() == name
    assert sorted(path.name for path in (tmp_path / "export" / "transformer").iterdir()) == [
        "NOTICE",
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


def test_a_student_with_a_branch_is_refused(tmp_path, params):
    source = pipeline_folder(tmp_path / "source", SMALL)
    params = {**params, "proj_out": {**params["proj_out"], "L": jnp.ones((12, 4))}}
    with pytest.raises(UserError, match=r"still has 1 low-rank branches \(such as proj_out\)"):
        export_pipeline(source, tmp_path / "export", SMALL, params, QuantConfig(rank=4))
    assert not (tmp_path / "export").exists()


def test_a_damaged_export_is_refused(tmp_path, params):
    source = pipeline_folder(tmp_path / "source", SMALL)
    export_pipeline(source, tmp_path / "export", SMALL, params, QuantConfig(rank=0))
    folder = tmp_path / "export" / "transformer"
    tensors = dict(Tensors(folder))
    del tensors["proj_out.codes"]
    write_tensors(folder / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(UserError, match=r"1 tensors of packed linears are missing.*proj_out"):
        read_transformer(folder, jnp.float32)


def test_an_export_never_replaces_something_else(tmp_path, params):
    quant = QuantConfig(rank=0)
    source = pipeline_folder(tmp_path / "source", SMALL)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(UserError, match="choose another folder"):
        export_pipeline(source, tmp_path / "mine", SMALL, params, quant)
    with pytest.raises(UserError, match="is the pipeline itself"):
        export_pipeline(source, source, SMALL, params, quant)
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep me"


def test_only_an_earlier_export_is_replaced(tmp_path, params):
    quant, target = QuantConfig(rank=0), tmp_path / "export"
    source = pipeline_folder(tmp_path / "source", SMALL)
    pipeline_folder(target, SMALL)
    with pytest.raises(UserError, match="no earlier export"):
        export_pipeline(source, target, SMALL, params, quant)
    target.rename(tmp_path / "export.partial")
    with pytest.raises(UserError, match="another conversion left unfinished"):
        export_pipeline(source, target, SMALL, params, quant)
    assert (tmp_path / "export.partial" / "model_index.json").is_file()
    shutil.rmtree(tmp_path / "export.partial")
    for _ in range(2):
        export_pipeline(source, target, SMALL, params, quant)
        (target / "old.txt").write_text("of an earlier export")
    export_pipeline(source, target, SMALL, params, quant)
    assert not (target / "old.txt").exists()
    assert not (target / "progress.jsonl").exists()
