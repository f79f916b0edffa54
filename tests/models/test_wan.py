"""The Wan transformer: diffusers' recorded outputs, its config, and what must not change them."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch, to_torch
from convert.wan_transformer import name_table
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import TEXT_ONLY, TIME_ONLY, WanConfig, WanTransformer, quantizable
from qvgen_jax.quant.dense import Dense
from tests.golden.tiny_models import WAN as TINY

GOLDEN = Path(__file__).parent.parent / "golden/wan_transformer.npz"
# As published with Wan2.1-T2V-1.3B; the 14B differs in three fields.
WAN_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}
WAN_14B = WAN_1_3B | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden["shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(golden["weights"].astype(np.float32), ends)
    return {k: v.reshape(shape) for (k, shape), v in zip(shapes.items(), parts, strict=True)}


@pytest.fixture(scope="module")
def params(weights) -> dict:
    return from_torch(name_table(WanConfig.from_json(TINY)), weights)


def abstract(fields: dict = TINY, **options) -> WanTransformer:
    config = WanConfig.from_json(fields)
    return nnx.eval_shape(lambda: WanTransformer(config, key=jax.random.key(0), **options))


def run(params: dict, *inputs: np.ndarray, **options) -> jax.Array:
    graph = nnx.graphdef(abstract(**options))
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, *x: nnx.merge(graph, params)(*x))(params, *inputs)


def inputs_of(golden: dict, name: str) -> list[np.ndarray]:
    return [golden[f"{name}_{key}"] for key in ("latents", "timesteps", "text")]


def error(got: jax.Array, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(got, np.float32) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", ["video", "image"])
def test_the_velocity_equals_what_diffusers_recorded(golden, params, name):
    got = run(params, *inputs_of(golden, name))
    assert error(got, golden[f"{name}_velocity"]) < 1e-5  # float32, another summation order


def test_bfloat16_computes_the_same_velocity_up_to_its_rounding(golden, params):
    got = run(params, *inputs_of(golden, "video"), dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32  # that of the latents
    assert error(got, golden["video_velocity"]) < 0.05  # 8 bits of mantissa through two blocks


@pytest.mark.slow
def test_recomputing_the_blocks_keeps_the_gradients(golden, params):
    def gradients(remat: str) -> dict:
        graph = nnx.graphdef(abstract(remat=remat))

        def loss(params):
            return jnp.sum(jnp.square(nnx.merge(graph, params)(*inputs_of(golden, "video"))))

        return jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params))

    kept, recomputed = gradients("none"), gradients("blocks")
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        scale = np.abs(a).max()
        assert scale > 0  # every parameter takes part
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0)  # another fusion order


def test_a_sample_does_not_depend_on_its_batch(golden, params):
    inputs = inputs_of(golden, "video")
    both, second = run(params, *inputs), run(params, *(x[1:] for x in inputs))
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


def test_converting_there_and_back_keeps_every_tensor(weights, params):
    back = to_torch(name_table(WanConfig.from_json(TINY)), params)
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_the_factory_is_asked_for_exactly_the_quantizable_linears():
    asked = set()

    def dense(name, *args, **options):
        asked.add(name)
        return Dense(name, *args, **options)

    model = abstract(dense=dense)
    names = quantizable(model.config)
    assert asked == set(names)
    assert len(names) == len(asked)
    assert set(TEXT_ONLY) | set(TIME_ONLY) < asked
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for name in names:  # A name is the path of the layer's parameters.
        node = params
        for part in name.split("."):
            node = node[part]
        assert node.keys() == {"kernel", "bias"}


def test_qvgen_quantizes_306_linears_of_the_1_3b():
    config = WanConfig.from_json(WAN_1_3B)
    names = quantizable(config)
    stacked = sum(name.startswith("blocks.") for name in names)
    assert len(names) - stacked + stacked * config.num_layers == 306


def test_a_config_reads_the_published_fields():
    config = WanConfig.from_json(WAN_14B | {"_diffusers_version": "0.33.0"})
    expected = {key: WAN_14B[key] for key in dataclasses.asdict(config)}
    assert dataclasses.asdict(config) == expected | {"patch_size": (1, 2, 2)}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_dim": 1280}, "image_dim = 1280"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim = 5120"),
        ({"in_channels": 36}, "in_channels = 36"),
        ({"in_channels": 48, "out_channels": 48}, "Wan 2.2"),
        ({"vace_layers": [0, 5]}, "vace_layers"),
        ({"_class_name": "CogVideoXTransformer3DModel"}, "CogVideoX"),
        ({"qk_norm": None}, "qk_norm = None"),
    ],
)
def test_other_variants_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        WanConfig.from_json(WAN_1_3B | fields)


@pytest.mark.parametrize("size", [(1, 3, 2), (1, 2, 5), (1, 2, 4000)])
def test_a_size_that_does_not_fit_the_patches_is_refused(params, size):
    latents, text = np.zeros((1, *size, 2), np.float32), np.zeros((1, 1, 6), np.float32)
    with pytest.raises(UserError, match="multiple of the patch"):
        run(params, latents, np.ones(1, np.float32), text)
