"""Smoothing: the published factors, exact without quantization, and what it is for with it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.quantize_tokens import quantize_tokens
from qvgen_jax.quant.calibration import Probe, observe, observing
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, Levels, QuantContext, QuantDense
from qvgen_jax.quant.initialize import quantize_params, round_to_nearest
from qvgen_jax.quant.packed import (
    leaves_of,
    pack_layer,
    quantization_config,
    read_quantization_config,
    unpack_layer,
)
from qvgen_jax.quant.packed_dense import PackedDense
from qvgen_jax.quant.smoothing import smooth_factors, smooth_tokens

IN, OUT = 48, 20
FINE = {"rank": 0, "buckets": 1, "initial_clip": 0.9999}


def drawn(seed=0):
    """Tokens with two loud channels that the kernel listens to less, as trained ones do; a bias."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(3, 30, IN))
    x[..., [4, 33]] *= 25
    kernel = rng.normal(size=(IN, OUT)) * rng.uniform(0.5, 2, size=(IN, 1))
    kernel[[4, 33]] *= 0.05
    return [jnp.asarray(a, jnp.float32) for a in (x, kernel, rng.normal(size=OUT))]


def maxima(x):
    return jnp.abs(x).max((0, 1))


def quantized(quant, kernel, bias, x, make=quantize_params):
    params = {"a": {"kernel": kernel, "bias": bias}}
    params, levels = make(params, ["a"], quant, {"a": maxima(x)})
    return params["a"], levels["a"]


def merged(form, quant, params, levels):
    built = nnx.eval_shape(lambda: form("a", IN, OUT, config=quant, key=jax.random.key(0)))
    return nnx.merge(nnx.split(built, nnx.Param, Levels)[0], params, levels)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.8])
def test_factors_are_the_published_formula_with_a_geometric_mean_of_one(alpha):
    x, kernel, _ = drawn()
    stack = jnp.stack([kernel, kernel[:, ::-1] * 3])
    found = smooth_factors(jnp.stack([maxima(x)] * 2), stack, alpha)
    activations, weights = np.abs(x).max((0, 1)), np.abs(kernel).max(1)
    expected = activations**alpha / weights ** (1 - alpha)
    expected = expected / np.exp(np.log(expected).mean())
    np.testing.assert_allclose(found, [expected, expected], rtol=1e-5)


def test_silent_channels_get_factors_that_are_finite_and_bounded():
    activations = jnp.asarray([100.0, 1.0, 0.0, 1e-30])
    kernel = jnp.asarray([[1.0], [0.0], [1e-20], [1.0]])
    found = smooth_factors(activations, kernel, 0.5)
    assert found.max() / found.min() <= 1001
    np.testing.assert_allclose(smooth_factors(0 * activations, 0 * kernel, 0.5), 1, rtol=1e-5)


@pytest.mark.parametrize("rotation", ["none", "hadamard"])
def test_at_eight_bits_a_smoothed_layer_computes_what_it_did(rotation):
    x, kernel, bias = drawn()
    quant = QuantConfig(8, 8, smoothing=0.5, rotation=rotation, **FINE)
    expected = x @ kernel + bias
    for make in (quantize_params, round_to_nearest):
        y = merged(QuantDense, quant, *quantized(quant, kernel, bias, x, make))(x)
        assert jnp.linalg.norm(y - expected) < 0.012 * jnp.linalg.norm(expected)


def test_four_bit_tokens_survive_outlier_channels_when_smoothed():
    x, kernel, bias = drawn()
    expected = x @ kernel

    def error(**options) -> float:
        quant = QuantConfig(8, 4, **options, **FINE)
        y = merged(QuantDense, quant, *quantized(quant, kernel, bias, x))(x) - bias
        return float(jnp.linalg.norm(y - expected) / jnp.linalg.norm(expected))

    assert error() > 0.5
    assert error(smoothing=0.5) < 0.1
    assert error(smoothing=0.5, rotation="hadamard") < 0.1


def test_the_kernel_keeps_the_factors_and_the_rotation_comes_after_them():
    x, kernel, bias = drawn()
    quant = QuantConfig(smoothing=0.5, rotation="hadamard", **FINE)
    params, levels = quantized(quant, kernel, bias, x)
    factors = smooth_factors(maxima(x), kernel, 0.5)
    np.testing.assert_array_equal(levels["smooth"], factors)
    assert "smooth" not in params
    layer = merged(QuantDense, quant, params, levels)
    ready = layer.prepare(x)
    np.testing.assert_allclose(ready @ params["kernel"], x @ kernel, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(smooth_tokens(x, factors) * factors, x, rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"smoothing": 0.5},
        {"rotation": "hadamard"},
        {"smoothing": 0.5, "rotation": "hadamard"},
    ],
)
def test_the_packed_layer_computes_the_same_bits(options):
    x, kernel, bias = drawn()
    quant = QuantConfig(rank=0, buckets=1, **options)
    params, levels = quantized(quant, kernel, bias, x)
    trained = merged(QuantDense, quant, params, levels)
    tensors = pack_layer(params | {"smooth": levels.pop("smooth", None)}, 4)
    assert set(tensors) == set(leaves_of(quant, "a"))
    packed = merged(PackedDense, quant, unpack_layer(tensors, 4, IN), levels)
    np.testing.assert_array_equal(packed(x), trained(x))
    np.testing.assert_array_equal(packed.prepare(x), trained.prepare(x))
    # Tokens that are quantized already are ready already.
    tokens = quantize_tokens(trained.prepare(x), **trained.clip_arguments(x, QuantContext()))
    np.testing.assert_array_equal(packed(tokens), packed(x))
    np.testing.assert_array_equal(trained(tokens), packed(x))


def test_the_config_of_an_export_tells_of_smoothing():
    quant = QuantConfig(smoothing=0.4, folded={"a": ("b", 8)}, rank=0)
    fields = json.loads(json.dumps(quantization_config(quant)))
    assert fields["format_version"] == 3
    assert read_quantization_config(fields) == quant
    assert "smooth" in leaves_of(quant, "b")
    assert "smooth" not in leaves_of(quant, "a")


def test_smoothing_without_measured_activations_is_an_error():
    _, kernel, _ = drawn()
    with pytest.raises(ValueError, match="largest activations of 'a'"):
        quantize_params({"a": {"kernel": kernel}}, ["a"], QuantConfig(smoothing=0.5, rank=0))


def test_a_probe_has_the_largest_magnitudes_for_its_gradient_and_changes_none():
    x, kernel, _ = drawn()

    def loss(x, probe):
        return jnp.sum((observe(x, probe) @ kernel) ** 2)

    d_x, found = jax.grad(loss, (0, 1))(x, jnp.zeros(IN))
    np.testing.assert_array_equal(found, np.abs(x).max((0, 1)))
    np.testing.assert_array_equal(d_x, jax.grad(lambda x: jnp.sum((x @ kernel) ** 2))(x))


def test_only_named_layers_are_observed():
    dense = observing(["a"])
    key = jax.random.key(0)
    assert "probe" in nnx.to_pure_dict(nnx.state(dense("a", 4, 5, key=key), Probe))
    assert type(dense("b", 4, 5, key=key)) is Dense
