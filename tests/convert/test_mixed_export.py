"""Blocks of 3, 4 and 8 bits in one export: on disk, and that it computes what was trained."""

import json
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.export import export_pipeline
from convert.load import read_transformer
from convert.packed import packed_definition
from convert.save import write_json
from convert.tensors import Tensors, read_json
from kernels.layouts import unlay
from qvgen_jax import sharding
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES
from qvgen_jax.models import build_transformer, config_from_json, quantizable, text_only
from qvgen_jax.quant.blocks import places_of, segments_of
from qvgen_jax.quant.code_planes import packed_bytes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.packed import quantization_config, read_quantization_config
from qvgen_jax.training.student import student_definition
from qvgen_jax.transformer import Transformer
from tests.golden import tiny_models

MODELS = {
    "wan": {"_class_name": "WanTransformer3DModel", **tiny_models.WAN_ODD, "num_layers": 4},
    "cogvideox": {
        "_class_name": "CogVideoXTransformer3DModel",
        **tiny_models.COGVIDEOX,
        "num_layers": 4,
    },
}
# Blocks 1 and 2 have linears of 8 bits: three segments. Block 0 has one of 3 bits among those of 4.
MIXED = {
    "blocks.attn1.to_k": (4, 3),
    "blocks.0.attn1.to_q": (3, 3),
    "blocks.1.attn1.to_q": (8, 8),
    "blocks.1.ffn.down": (8, 4),
    "blocks.2.attn1.to_q": (8, 8),
    "blocks.2.ffn.down": (6, 4),
    "proj_out": (8, 8),
}


@cache
def trained(family):
    """The training form of a network around random parameters, and how it is quantized."""
    model = config_from_json(MODELS[family])
    quant = QuantConfig(rank=0, bits=MIXED, single_clip=text_only(model))
    plain = build_transformer(model, key=jax.random.key(0))
    params = nnx.to_pure_dict(nnx.state(plain, nnx.Param))
    states = quantize_params(params, quantizable(model), quant)
    graphdef = student_definition(model, quant, jnp.float32, branch=False)
    return Transformer(model, graphdef, states), quant


def exported(tmp_path, family):
    student, quant = trained(family)
    source = tmp_path / "source"
    write_json(source / "transformer" / "config.json", MODELS[family])
    write_json(source / "model_index.json", {"_class_name": "WanPipeline"})
    export_pipeline(source, tmp_path / "export", student.config, student.states[0], quant)
    return student, tmp_path / "export" / "transformer"


def inputs(model):
    keys = jax.random.split(jax.random.key(1), 2)
    width = model.text_dim if hasattr(model, "text_dim") else model.text_embed_dim
    latents = jax.random.normal(keys[0], (2, 3, 4, 6, model.in_channels))
    return latents, jnp.asarray([951.0, 331.0]), jax.random.normal(keys[1], (2, 5, width))


def assert_computes_the_same(loaded, student):
    arguments = inputs(student.config)
    # Each segment is a program of its own, whose float32 sums and norms may differ in their last
    # bits (found: 1.2e-7, of values about 1); another code would move a value by 1e-2.
    np.testing.assert_allclose(loaded(*arguments), student(*arguments), rtol=0, atol=1e-5)


FAMILIES = pytest.mark.parametrize("family", MODELS)


@FAMILIES
def test_student_and_export_mean_the_same_weights_in_every_block(tmp_path, family):
    student, folder = exported(tmp_path, family)
    quant = read_quantization_config(read_json(folder / "config.json")["quantization_config"])
    definition = packed_definition(student.config, quant, jnp.float32)
    loaded = read_transformer(folder, jnp.float32)
    for name in quant.quantized(quantizable(student.config)):
        node, levels = (layer_at(state, name) for state in student.states)
        kernel, scale, zero = (np.asarray(node[x]) for x in ("kernel", "scale", "zero_point"))
        scale, zero = scale[..., None, :], zero[..., None, :]
        most = np.asarray(levels["weight_levels"])[..., None, None]
        expected = scale * (np.clip(np.rint(kernel / scale + zero), 0, most) - zero)
        for path, blocks, _ in places_of(name, definition.segments):
            packed, held = (layer_at(state, path) for state in loaded.states)
            codes = unlay(np.asarray(packed["codes"]), kernel.shape[-2], definition.layouts[path])
            offset = (np.asarray(held["weight_levels"]) + 1)[..., None, None] / 2
            zero = np.asarray(packed["zero_point"])[..., None, :] - offset
            found = np.asarray(packed["scale"])[..., None, :] * (np.asarray(codes) - zero)
            rows = ... if blocks is None else slice(blocks.start, blocks.stop)
            # The same codes; 2^(bits - 1) away from the zero point rounds once more.
            np.testing.assert_allclose(found, expected[rows], rtol=0, atol=1e-6)


@pytest.mark.slow
@FAMILIES
def test_a_mixed_export_computes_what_was_trained(tmp_path, family):
    student, folder = exported(tmp_path, family)
    loaded = read_transformer(folder, jnp.float32)
    assert_computes_the_same(loaded, student)
    blocks = loaded.states[0]["blocks"]
    assert sorted(blocks) == ["from_0", "from_1", "from_3"]
    assert blocks["from_1"]["attn1"]["to_q"]["codes"].shape[0] == 2
    # Two codes a byte where 4 bits suffice.
    narrow, wide = (blocks[part]["attn1"]["to_q"]["codes"] for part in ("from_0", "from_1"))
    assert 2 * narrow[0].size == wide[0].size


@pytest.mark.slow
def test_codes_in_wider_containers_compute_the_same(tmp_path, monkeypatch):
    student, folder = exported(tmp_path, "wan")
    monkeypatch.setattr("convert.packed.segments_of", partial(segments_of, most=1))
    loaded = read_transformer(folder, jnp.float32)
    assert "attn1" in loaded.states[0]["blocks"]
    assert_computes_the_same(loaded, student)


def test_each_block_s_codes_have_its_own_bits_on_disk(tmp_path):
    student, folder = exported(tmp_path, "wan")
    tensors, dim = Tensors(folder), student.config.dim
    bytes_of = [tensors[f"blocks.{i}.attn1.to_q.codes"].shape[1] for i in range(4)]
    assert bytes_of == [packed_bytes(dim, bits) for bits in (3, 8, 8, 4)]
    fields = read_json(folder / "config.json")["quantization_config"]
    assert fields["format_version"] == 3
    assert fields["bits_by_layer"]["blocks.1.ffn.down"] == {"weights": 8, "activations": 4}


def test_bits_of_blocks_survive_the_config_and_older_versions_are_refused():
    quant = QuantConfig(rank=0, bits=MIXED)
    fields = json.loads(json.dumps(quantization_config(quant)))
    assert read_quantization_config(fields) == quant
    with pytest.raises(UserError, match=r"bits to single blocks and has format_version=1.* 3; exp"):
        read_quantization_config(fields | {"format_version": 1})


def test_bits_of_all_blocks_are_written_as_before():
    quant = QuantConfig(rank=0, bits={"blocks.attn1.to_q": (8, 8)})
    assert quantization_config(quant)["format_version"] == 1


@FAMILIES
def test_segments_are_cut_over_a_mesh_like_one_stack(family):
    model = config_from_json(MODELS[family])
    mixed, plain = (
        packed_definition(model, QuantConfig(rank=0, bits=bits), jnp.float32).shapes
        for bits in (MIXED, {})
    )

    def specs(shapes):
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        paths = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
        return {path: sharding.spec_of(path) for path in paths}

    found, expected = specs(mixed), specs(plain)
    starts = ("blocks.from_0.", "blocks.from_1.", "blocks.from_3.")
    inside = {path.removeprefix("blocks.") for path in expected if path.startswith("blocks.")}
    assert {path for path in found if path.startswith("blocks.")} == {
        start + path for start in starts for path in inside
    }
    assert any("tensor" in spec for spec in expected.values())
    for path, spec in found.items():
        assert spec == expected[re.sub(r"^blocks\.from_\d+", "blocks", path)], path


def test_an_export_of_segments_is_loaded_onto_a_mesh(tmp_path):
    mesh = jax.make_mesh((1,) * len(AXES), AXES)
    _, folder = exported(tmp_path, "wan")
    loaded = read_transformer(folder, jnp.float32, lambda like: sharding.shard(like, mesh))
    codes = loaded.states[0]["blocks"]["from_1"]["ffn"]["up"]["codes"]
    assert codes.sharding.mesh == mesh
