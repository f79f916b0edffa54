"""The CogVideoX transformers: diffusers' recorded outputs, their config, their quantized form."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.cogvideox_transformer import name_table
from convert.names import from_torch, to_torch
from qvgen_jax.errors import UserError
from qvgen_jax.models.cogvideox import (
    TEXT_ONLY,
    TIME_ONLY,
    CogVideoXConfig,
    CogVideoXTransformer,
    quantizable,
)
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.training.student import student_definition
from qvgen_jax.training.teacher import teacher_definition
from tests.golden.tiny_models import COGVIDEOX_MODELS as VARIANTS

GOLDEN = Path(__file__).parent.parent / "golden/cogvideox_transformer.npz"


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


def weights_of(golden: dict, variant: str) -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden[f"{variant}_shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(golden[f"{variant}_weights"].astype(np.float32), ends)
    return {k: v.reshape(shape) for (k, shape), v in zip(shapes.items(), parts, strict=True)}


def config_of(variant: str, **changes) -> CogVideoXConfig:
    return CogVideoXConfig.from_json(VARIANTS[variant] | changes)


def params_of(golden: dict, variant: str) -> dict:
    return from_torch(name_table(config_of(variant)), weights_of(golden, variant))


def inputs_of(golden: dict, variant: str, name: str) -> tuple[np.ndarray, ...]:
    return tuple(golden[f"{variant}_{name}_{key}"] for key in ("latents", "timesteps", "text"))


def abstract(variant: str, **options) -> CogVideoXTransformer:
    config = config_of(variant)
    return nnx.eval_shape(lambda: CogVideoXTransformer(config, key=jax.random.key(0), **options))


def run(variant: str, params: dict, *inputs: np.ndarray, **options) -> jax.Array:
    graph = nnx.graphdef(abstract(variant, **options))
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, *x: nnx.merge(graph, params)(*x))(params, *inputs)


def error(got, expected) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["video", "image"])
def test_v_equals_what_diffusers_recorded(golden, variant, name):
    got = run(variant, params_of(golden, variant), *inputs_of(golden, variant, name))
    assert error(got, golden[f"{variant}_{name}_v"]) < 1e-5  # float32, another summation order


def test_bfloat16_computes_the_same_v_up_to_its_rounding(golden):
    inputs = inputs_of(golden, "2b", "video")
    got = run("2b", params_of(golden, "2b"), *inputs, dtype=jnp.bfloat16)
    assert got.dtype == jnp.float32  # that of the latents
    assert error(got, golden["2b_video_v"]) < 0.05  # 8 bits of mantissa through two blocks


@pytest.mark.slow
def test_recomputing_the_blocks_keeps_the_gradients(golden):
    def gradients(remat: str) -> dict:
        graph = nnx.graphdef(abstract("5b", remat=remat))

        def loss(params):
            v = nnx.merge(graph, params)(*inputs_of(golden, "5b", "video"))
            return jnp.sum(jnp.square(v))

        return jax.jit(jax.grad(loss))(jax.tree.map(jnp.asarray, params_of(golden, "5b")))

    kept, recomputed = gradients("none"), gradients("blocks")
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        scale = np.abs(a).max()
        assert scale > 0  # every parameter takes part
        np.testing.assert_allclose(a, b, atol=1e-5 * scale, rtol=0)  # another fusion order


def test_a_sample_does_not_depend_on_its_batch(golden):
    inputs, params = inputs_of(golden, "5b", "video"), params_of(golden, "5b")
    both, second = run("5b", params, *inputs), run("5b", params, *(x[1:] for x in inputs))
    np.testing.assert_allclose(both[1:], second, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_converting_there_and_back_keeps_every_tensor(golden, variant):
    weights = weights_of(golden, variant)
    back = to_torch(name_table(config_of(variant)), params_of(golden, variant))
    assert back.keys() == weights.keys()
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_factory_is_asked_for_exactly_the_quantizable_linears(variant):
    asked = set()

    def dense(name, *args, **options):
        asked.add(name)
        return Dense(name, *args, **options)

    model = abstract(variant, dense=dense)
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


@pytest.mark.parametrize(
    ("model", "count"), [("CogVideoX-2B", 245), ("CogVideoX-5B", 341), ("CogVideoX1.5-5B", 342)]
)
def test_qvgen_quantizes_245_linears_of_the_2b_and_the_patches_of_1_5(model, count):
    path = Path(__file__).parent / f"configs/{model}.json"
    config = CogVideoXConfig.from_json(json.loads(path.read_text()))
    names = quantizable(config)
    stacked = sum(name.startswith("blocks.") for name in names)
    assert len(names) - stacked + stacked * config.num_layers == count


@pytest.mark.slow
def test_a_quantized_student_learns_from_its_teacher(golden):
    model, quant = config_of("1_5"), QuantConfig(rank=4, single_clip=TEXT_ONLY)
    inputs = inputs_of(golden, "1_5", "video")
    params = jax.tree.map(jnp.asarray, params_of(golden, "1_5"))
    student, levels = quantize_params(params, quantizable(model), quant)
    teacher = teacher_definition(model, jnp.float32)
    describe = student_definition(model, quant, jnp.float32, branch=True)
    target = jax.jit(lambda params: nnx.merge(teacher, params)(*inputs))(params)

    @jax.jit
    @jax.value_and_grad
    def distill(student):
        v = nnx.merge(describe, student, levels)(*inputs, gate=jnp.ones(4))
        return jnp.mean(jnp.square(v - target))

    before, gradients = distill(student)
    assert 0 < before < jnp.mean(jnp.square(target))  # nearer to the teacher than silence is
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        name = jax.tree_util.keystr(path)
        # A zero point has none where no weight is clipped.
        assert np.abs(leaf).max() > 0 or name.endswith("['zero_point']"), name
    size = np.sqrt(sum(float(jnp.sum(jnp.square(g))) for g in jax.tree.leaves(gradients)))
    stepped = jax.tree.map(lambda p, g: p - 0.01 / size * g, student, gradients)
    assert distill(stepped)[0] < before


def test_latent_frames_are_filled_up_for_patches_of_two_frames_only():
    assert [config_of("1_5").extra_frames(frames) for frames in (1, 2, 13, 21)] == [1, 0, 1, 1]
    assert config_of("5b").extra_frames(13) == 0


@pytest.mark.parametrize(
    ("variant", "size"), [("2b", (1, 3, 2)), ("5b", (1, 2, 5)), ("1_5", (3, 2, 2))]
)
def test_a_size_that_does_not_fit_the_patches_is_refused(golden, variant, size):
    latents, text = np.zeros((1, *size, 2), np.float32), np.zeros((1, 1, 6), np.float32)
    with pytest.raises(UserError, match="multiple of the patch"):
        run(variant, params_of(golden, variant), latents, np.ones(1, np.float32), text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"in_channels": 32}, "in_channels = 32"),
        ({"ofs_embed_dim": 512}, "ofs_embed_dim = 512"),
        ({"use_learned_positional_embeddings": True}, "use_learned_positional_embeddings = True"),
        ({"patch_size_t": 2}, "patch_size_t = 2"),  # with sin-cos positions
        ({"patch_bias": False}, "patch_bias = False"),
        ({"attention_head_dim": 20}, "40 channels"),
        ({"control_layers": 3}, "control_layers"),
        ({"_class_name": "ConsisIDTransformer3DModel"}, "ConsisID"),
    ],
)
def test_other_variants_are_refused_by_name_and_with_what_is_supported(changes, named):
    with pytest.raises(UserError, match=named) as refusal:
        config_of("2b", **changes)
    assert "CogVideoX1.5-5B text-to-video" in str(refusal.value)
