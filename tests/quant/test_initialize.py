"""From full-precision parameters to quantized ones, and the quantized transformer around them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import TEXT_ONLY, WanConfig, WanTransformer, quantizable
from qvgen_jax.quant.clips import clip_index
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantization_errors, quantize_params, round_to_nearest
from tests.compiling import optimized

MODEL = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=6,
    out_channels=6,
    text_dim=24,
    freq_dim=24,
    ffn_dim=24,
    num_layers=2,
)
NAMES = quantizable(MODEL)
QUANT = QuantConfig(rank=3, single_clip=TEXT_ONLY)


def network(dense, **settings):
    model = nnx.eval_shape(
        lambda: WanTransformer(MODEL, key=jax.random.key(0), dense=dense, **settings)
    )
    return nnx.split(model, nnx.Param, Levels)


@pytest.fixture(scope="module")
def teacher():
    return nnx.to_pure_dict(nnx.state(WanTransformer(MODEL, key=jax.random.key(0)), nnx.Param))


@pytest.fixture(scope="module")
def student(teacher):
    return quantize_params(teacher, NAMES, QUANT)


def inputs(batch=2):
    keys = jax.random.split(jax.random.key(1), 2)
    latents = jax.random.normal(keys[0], (batch, 2, 4, 4, 6))
    return latents, jnp.asarray([1000.0, 331.0]), jax.random.normal(keys[1], (batch, 5, 24))


def test_the_trees_are_those_of_the_module(student):
    _, params, levels = network(dense_factory(QUANT, "train"))
    shapes = [jax.tree.map(jnp.shape, tree) for tree in student]
    assert shapes[0] == jax.tree.map(jnp.shape, nnx.to_pure_dict(params))
    assert shapes[1] == jax.tree.map(jnp.shape, nnx.to_pure_dict(levels))
    assert shapes[0]["blocks"]["attn2"]["to_k"]["lower"] == (2, 1)
    assert shapes[0]["blocks"]["attn2"]["to_q"]["lower"] == (2, 50)


def test_the_teacher_is_left_alone(teacher, student):
    assert "scale" not in teacher["proj_out"]
    assert student[0]["proj_out"]["kernel"] is teacher["proj_out"]["kernel"]


def test_with_quantizers_off_the_student_equals_the_teacher(teacher):
    plain = network(dense_factory(QUANT, "plain"))[0]
    original = nnx.split(nnx.eval_shape(lambda: WanTransformer(MODEL, key=jax.random.key(0))))[0]
    np.testing.assert_array_equal(
        nnx.merge(plain, teacher)(*inputs()), nnx.merge(original, teacher)(*inputs())
    )


def test_eight_bits_are_close_to_the_teacher_and_fewer_are_farther(teacher):
    graphdef = nnx.split(nnx.eval_shape(lambda: WanTransformer(MODEL, key=jax.random.key(0))))[0]
    expected = nnx.merge(graphdef, teacher)(*inputs())
    errors = []
    for bits in (8, 4, 2):
        quant = QuantConfig(bits, bits, rank=0, initial_clip=0.9999)
        state = quantize_params(teacher, NAMES, quant)
        y = nnx.merge(network(dense_factory(quant, "train"))[0], *state)(*inputs())
        errors.append(float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected)))
    assert errors[0] < 0.05
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.slow
def test_both_guidance_branches_use_the_same_clips_as_training(student):
    graphdef = network(dense_factory(QUANT, "train"))[0]
    run = optimized(lambda *a, **k: nnx.merge(graphdef, *student)(*a, gate=jnp.ones(3), **k))
    latents, timesteps, text = inputs()
    alone = run(latents, timesteps, text)
    index = clip_index(timesteps, "bucket")
    np.testing.assert_array_equal(run(latents, timesteps, text, clip_index=index), alone)
    twice = [jnp.concatenate([a, a]) for a in (latents, timesteps, text)]
    both = run(*twice)
    np.testing.assert_array_equal(both[:2], both[2:])


@pytest.mark.slow
def test_every_quantizer_gets_a_gradient(student):
    graphdef = network(dense_factory(QUANT, "train"))[0]
    params, levels = student

    @jax.jit
    def gradients(params):
        def loss(params):
            model = nnx.merge(graphdef, params, levels)
            return jnp.sum(model(*inputs(), gate=jnp.ones(3)) ** 2)

        return jax.grad(loss)(params)

    grads = gradients(params)
    for name in NAMES:
        node = grads
        for part in name.split("."):
            node = node[part]
        for key in ("kernel", "scale", "zero_point", "lower", "upper", "L", "R"):
            assert jnp.isfinite(node[key]).all(), (name, key)
            # A zero point moves only where a weight is clipped, which need not be so at the start.
            assert key == "zero_point" or jnp.any(node[key] != 0), (name, key)


def test_errors_of_layers_shrink_with_bits_and_beat_round_to_nearest(teacher):
    names = ["proj_out", "blocks.ffn.up"]
    low = QuantConfig(3, 3, rank=0)
    searched = quantization_errors(*quantize_params(teacher, NAMES, low), names)
    assert searched["blocks.ffn.up"].shape == (2,)
    nearest = quantization_errors(*round_to_nearest(teacher, NAMES, low), names)
    fine = quantization_errors(*quantize_params(teacher, NAMES, QuantConfig(8, 8, rank=0)), names)
    for name in names:
        assert jnp.all(fine[name] < searched[name])
        assert jnp.all(searched[name] <= nearest[name] * 1.01)


def test_layers_in_full_precision_keep_only_their_kernel(teacher):
    quant = QuantConfig(rank=0, full_precision=("proj_out",))
    params, levels = quantize_params(teacher, NAMES, quant)
    assert set(params["proj_out"]) == {"kernel", "bias"}
    assert "proj_out" not in levels


def test_a_misspelt_layer_names_the_nearest(teacher):
    with pytest.raises(UserError, match=r"'proj_outt'.*nearest is 'proj_out'"):
        quantize_params(teacher, NAMES, QuantConfig(full_precision=("proj_outt",)))
    with pytest.raises(UserError, match=r"no layer 'blocks\.attn3'"):
        quantize_params(teacher, ["blocks.attn3"], QuantConfig(rank=0))
    with pytest.raises(UserError, match="2 to 8 each"):
        QuantConfig(weight_bits=1)
    with pytest.raises(UserError, match="product_dtype='float16'"):
        QuantConfig(product_dtype="float16")
