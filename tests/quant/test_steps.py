"""Learned steps of activations: LSQ's gradient, the buckets, a packed layer with the same bits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.chips import CHIPS
from kernels.choose import layout_of
from kernels.operands import Product
from qvgen_jax.errors import UserError
from qvgen_jax.quant.apply import apply_each
from qvgen_jax.quant.calibration import MEANS, observe
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels, QuantContext, QuantDense
from qvgen_jax.quant.initialize import quantize_params, round_to_nearest
from qvgen_jax.quant.packed import (
    leaves_of,
    pack_layer,
    quantization_config,
    read_quantization_config,
    unpack_layer,
)
from qvgen_jax.quant.packed_dense import PackedDense
from qvgen_jax.quant.steps import encode_with_step, fake_quantize_with_step, initial_step

LEVELS = jnp.asarray(15, jnp.float32)
IN, OUT = 19, 13
RANGES = ("learned", "learned_zero")


def tokens_of(seed: int, shape: tuple = (2, 7, IN)) -> jax.Array:
    return 0.3 + jax.random.normal(jax.random.key(seed), shape)


def moments_of(x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.abs(x).mean(), x.mean(), jnp.square(x).mean()])


def scalar(value: float) -> jax.Array:
    return jnp.full((1, 1, 1), value, jnp.float32)


def test_the_gradient_of_the_step_is_the_formula_of_lsq():
    """Eq. 3 entry by entry, in the paper's signed form and its -Qn, Qp, away from the bounds."""
    x, step = tokens_of(0) * 2, 0.4
    ratio = np.asarray(x, np.float64) / step
    lowest, highest = -8, 7
    # Within half a step beyond a bound the paper clips, where here a rounded code still counts.
    clear = (np.abs(ratio - lowest) > 0.5) & (np.abs(ratio - highest) > 0.5)
    expected = np.where(
        ratio <= lowest, lowest, np.where(ratio >= highest, highest, np.round(ratio) - ratio)
    )
    cotangent = np.where(clear, np.random.default_rng(0).normal(size=x.shape), 0)

    def loss(step):
        return jnp.sum(fake_quantize_with_step(x, step, None, LEVELS)[0] * cotangent)

    found = jax.grad(loss)(scalar(step))
    # Section 2.2: Nf features of a sample, Qp = 7.
    scale = 1 / np.sqrt(7 * IN * highest)
    np.testing.assert_allclose(found.item(), scale * np.sum(expected * cotangent), rtol=1e-5)
    assert (expected == lowest).any()
    assert (expected == highest).any()


@pytest.mark.parametrize("with_zero_point", [False, True])
def test_gradients_match_finite_differences_of_the_surrogate(with_zero_point):
    """The surrogate keeps the rounding error and the clamp's side that each entry has."""
    with jax.enable_x64(True):
        x, cotangent = (jnp.asarray(tokens_of(s), jnp.float64) for s in (1, 2))
        step, zero = (jnp.full((2, 1, 1), v, jnp.float64) for v in (0.17, 6.3))
        start = x / step + (zero if with_zero_point else 8.0)
        rounding, codes = jnp.round(start) - start, jnp.round(start)

        def surrogate(x, step, zero):
            middle = zero if with_zero_point else 8.0
            moved = x / step + middle + rounding
            moved = jnp.where(codes < 0, 0, jnp.where(codes > 15, 15, moved))
            return jnp.sum(step * (moved - middle) * cotangent)

        def ours(x, step, zero):
            middle = zero if with_zero_point else None
            return jnp.sum(fake_quantize_with_step(x, step, middle, LEVELS)[0] * cotangent)

        at = (x, step, zero)
        grads, change = jax.grad(ours, (0, 1, 2))(*at), 1e-6
        factor = 1 / np.sqrt(7 * IN * (15 if with_zero_point else 7))
        for i in range(2 + with_zero_point):
            direction = jax.random.normal(jax.random.key(i), at[i].shape, jnp.float64)
            ahead, behind = (
                surrogate(*at[:i], at[i] + sign * change * direction, *at[i + 1 :])
                for sign in (1, -1)
            )
            numeric = (ahead - behind) / (2 * change) * (factor if i else 1)
            np.testing.assert_allclose(jnp.sum(grads[i] * direction), numeric, rtol=1e-6)
        assert ((codes < 0) | (codes > 15)).any()


@pytest.mark.parametrize("zero_point", [None, 5.3])
def test_values_are_those_of_the_integers(zero_point):
    x, step = tokens_of(3), scalar(0.21)
    zero = None if zero_point is None else scalar(zero_point)
    values, tokens = fake_quantize_with_step(x, step, zero, LEVELS)
    middle = 8 if zero_point is None else zero_point
    codes = np.clip(np.round(np.asarray(x) / np.float32(0.21) + np.float32(middle)), 0, 15)
    np.testing.assert_array_equal(tokens.codes, codes - 8)
    np.testing.assert_array_equal(tokens.row_sum[..., 0], (codes - 8).sum(-1))
    np.testing.assert_allclose(values, 0.21 * (codes - middle), rtol=1e-5, atol=1e-6)
    assert tokens.scale.shape == tokens.zero_point.shape == (2, 7, 1)


def test_a_step_starts_where_lsq_says_and_a_zero_point_at_the_mean():
    x = 1.7 + 0.4 * jax.random.normal(jax.random.key(4), (4000, 9))
    step, none = initial_step(moments_of(x), LEVELS, False)
    np.testing.assert_allclose(step, 2 * np.abs(x).mean() / np.sqrt(7), rtol=1e-6)
    assert none is None
    step, zero = initial_step(moments_of(x), LEVELS, True)
    # Normal, so that the mean distance from the mean is what the variance says, to 1 %.
    distance = np.abs(x - x.mean()).mean()
    np.testing.assert_allclose(step, 2 * distance / np.sqrt(7), rtol=0.01)
    np.testing.assert_allclose(step * (8 - zero), x.mean(), rtol=1e-4)


def test_the_backward_pass_brings_the_moments():
    x = tokens_of(5)
    found = jax.grad(lambda probe: jnp.sum(observe(x, probe, measure=MEANS)))(jnp.zeros(3))
    np.testing.assert_allclose(found, moments_of(x), rtol=1e-6)


def layer_of(quant: QuantConfig, form=QuantDense, seed: int = 0) -> tuple:
    """A layer that reads `tokens_of(9)`, its buckets moved apart; and its params and levels."""
    keys = jax.random.split(jax.random.key(seed), 4)
    plain = {
        "kernel": jax.random.normal(keys[0], (IN, OUT)) / IN**0.5,
        "bias": jax.random.normal(keys[1], (OUT,)),
    }
    moments = {"a": moments_of(tokens_of(9))}
    params, levels = quantize_params({"a": plain}, ["a"], quant, moments=moments)
    params, levels = params["a"], levels["a"]
    for leaf, key in (("act_scale", keys[2]), ("act_zero_point", keys[3])):
        if leaf in params:
            noise = jax.random.uniform(key, params[leaf].shape, minval=0.8, maxval=1.2)
            params[leaf] = params[leaf] * noise
    return merged(form, quant, params, levels), params, levels


def merged(form, quant: QuantConfig, params: dict, levels: dict, **options) -> nnx.Module:
    built = nnx.eval_shape(
        lambda: form("a", IN, OUT, config=quant, key=jax.random.key(0), **options)
    )
    return nnx.merge(nnx.split(built, nnx.Param, Levels)[0], params, levels)


def unpacked(tensors: dict, bits: int) -> dict:
    layout = layout_of("xla", Product(None, IN, OUT, bits, bits), CHIPS["cpu"])
    return jax.tree.map(jnp.asarray, unpack_layer(tensors, bits, IN, layout))


@pytest.mark.parametrize("act_range", RANGES)
def test_each_sample_has_the_step_of_its_timestep(act_range):
    quant = QuantConfig(rank=0, act_range=act_range)
    layer, params, _ = layer_of(quant)
    x = tokens_of(9)
    both = layer(x, QuantContext(jnp.asarray([3, 41])))
    for sample, bucket in ((0, 3), (1, 41)):
        one = {k: v[bucket : bucket + 1] if k.startswith("act_") else v for k, v in params.items()}
        single = QuantConfig(rank=0, act_range=act_range, buckets=1)
        alone = merged(QuantDense, single, one, layer_of(single)[2])(x[sample : sample + 1])
        np.testing.assert_allclose(both[sample], alone[0], rtol=1e-5, atol=1e-5)

    def loss(scale):
        changed = merged(QuantDense, quant, {**params, "act_scale": scale}, layer_of(quant)[2])
        return jnp.sum(changed(x, QuantContext(jnp.asarray([3, 41]))) ** 2)

    grad = jax.grad(loss)(params["act_scale"])
    assert set(np.flatnonzero(grad)) == {3, 41}
    with pytest.raises(ValueError, match="clip_index"):
        layer(x)


@pytest.mark.parametrize("act_range", RANGES)
@pytest.mark.parametrize("bits", [4, 3])
def test_the_packed_layer_computes_the_same_bits(act_range, bits):
    quant = QuantConfig(bits, bits, rank=0, act_range=act_range, buckets=5)
    layer, params, levels = layer_of(quant)
    tensors = pack_layer(params, bits)
    assert set(tensors) == set(leaves_of(quant, "a"))
    assert "clips" not in tensors
    read = read_quantization_config(json.loads(json.dumps(quantization_config(quant))))
    assert (read.act_range, read.buckets) == (act_range, 5)
    assert quantization_config(quant)["format_version"] == 3
    packed = merged(PackedDense, read, unpacked(tensors, bits), levels)
    ctx, x = QuantContext(jnp.asarray([0, 4])), tokens_of(9)
    np.testing.assert_array_equal(packed(x, ctx), layer(x, ctx))


def test_a_gpus_quantizers_are_not_asked_for_a_learned_step(monkeypatch):
    """They know a token's own range alone; the layer encodes and hands the integers over."""
    quant = QuantConfig(rank=0, act_range="learned", buckets=1)
    _, params, levels = layer_of(quant)
    packed = merged(PackedDense, quant, unpacked(pack_layer(params, 4), 4), levels)
    packed.backend = "hopper"

    def refused(*arguments, **options):
        raise AssertionError("a fused quantizer was asked")

    monkeypatch.setattr("qvgen_jax.quant.apply.quantize_several", refused)
    x = tokens_of(9)
    (y,) = apply_each([packed], x, QuantContext())
    encoded = encode_with_step(x, scalar(params["act_scale"][0]), None, levels["act_levels"])
    np.testing.assert_array_equal(y, packed(encoded, QuantContext()))


def test_symmetric_layers_take_no_correction_for_zero():
    """LSQ's product needs none of its three: both zero points are the middle of the codes."""
    tokens = encode_with_step(tokens_of(9), scalar(0.2), None, LEVELS)
    np.testing.assert_array_equal(tokens.zero_point, 0)


def test_steps_need_moments_and_refuse_what_moves_the_tokens():
    kernel = {"a": {"kernel": jnp.ones((IN, OUT))}}
    with pytest.raises(ValueError, match="activation_moments"):
        quantize_params(kernel, ["a"], QuantConfig(rank=0, act_range="learned"))
    with pytest.raises(UserError, match="leave smoothing and rotation away"):
        QuantConfig(act_range="learned", rotation="hadamard")
    nearest, _ = round_to_nearest(kernel, ["a"], QuantConfig(act_range="learned"))
    assert {"lower", "upper"} <= set(nearest["a"])
