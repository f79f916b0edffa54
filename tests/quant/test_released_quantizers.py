"""Equality with QVGen's released quantizers, forward and gradients, from golden vectors.

Tolerance: float32 rounding of sums of ten products, 2e-6 of the largest value.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.quant.clips import clip_index
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels, QuantContext, QuantDense
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import refactor
from qvgen_jax.quant.schedule import RankDecay, gate_at
from qvgen_jax.quant.tokens import clip_multipliers, fake_quantize_tokens
from qvgen_jax.quant.weights import fake_quantize_weight, search_range

GOLDEN = Path(__file__).parents[1] / "golden" / "released_quantizers.npz"
DECAY = RankDecay(phase_steps=6, rank=4)


@pytest.fixture(params=[4, 3])
def bits(request):
    return request.param


@pytest.fixture
def golden(bits):
    with np.load(GOLDEN) as arrays:
        prefix = f"w{bits}/"
        return {k.removeprefix(prefix): arrays[k] for k in arrays if k.startswith(prefix)}


@pytest.fixture
def levels(bits):
    return jnp.asarray(2**bits - 1, jnp.float32)


def assert_close(ours, released, tolerance=2e-6):
    released = np.asarray(released)
    np.testing.assert_allclose(
        np.asarray(ours).reshape(released.shape),
        released,
        rtol=0,
        atol=tolerance * abs(released).max(),
    )


def test_range_search(golden, levels):
    scale, zero_point = search_range(jnp.asarray(golden["start/w"].T), levels)
    assert_close(scale, golden["start/scale"])
    assert_close(zero_point, golden["start/zero_point"])


def test_weights(golden, levels):
    arguments = (
        golden["trained/w"].T,
        golden["trained/scale"][:, 0],
        golden["trained/zero_point"][:, 0],
    )
    y, pullback = jax.vjp(lambda *a: fake_quantize_weight(*a, levels), *map(jnp.asarray, arguments))
    grads = pullback(jnp.asarray(golden["weight/cotangent"].T))
    assert_close(y.T, golden["weight/y"])
    assert_close(grads[0].T, golden["weight/grad_w"])
    assert_close(grads[1], golden["weight/grad_scale"])
    assert_close(grads[2], golden["weight/grad_zero_point"])


def test_activations(golden, levels):
    index = jnp.full((2,), int(golden["clip_index"]), jnp.int32)

    def quantize(x, lower, upper):
        return fake_quantize_tokens(
            x,
            clip_multipliers(lower, index, x.ndim),
            clip_multipliers(upper, index, x.ndim),
            levels,
            include_zero=False,
            clip_ratio=0.95,
        )[0]

    inputs = [jnp.asarray(golden[k]) for k in ("x", "trained/lower", "trained/upper")]
    y, pullback = jax.vjp(quantize, *inputs)
    assert_close(y, golden["act/y"])
    for grad, name in zip(
        pullback(jnp.asarray(golden["act/cotangent"])), ("x", "lower", "upper"), strict=True
    ):
        assert_close(grad, golden[f"act/grad_{name}"])


@pytest.mark.parametrize("product_dtype", ["int8", "float32"])
def test_whole_linear_with_the_branch(golden, bits, levels, product_dtype):
    config = QuantConfig.released(
        weight_bits=bits, act_bits=bits, rank=4, product_dtype=product_dtype
    )
    graphdef, _, _ = nnx.split(
        QuantDense("layer", 10, 6, config=config, key=jax.random.key(0)), nnx.Param, Levels
    )
    names = {"kernel": "w", "bias": "b"}
    keys = ("kernel", "bias", "scale", "zero_point", "lower", "upper", "L", "R")
    params = {}
    for key in keys:
        array = golden[f"trained/{names.get(key, key)}"]
        array = array.T if key == "kernel" else array
        params[key] = jnp.asarray(array[:, 0] if key in ("scale", "zero_point") else array)
    index = jnp.full((2,), int(golden["clip_index"]), jnp.int32)
    ctx = QuantContext(index, gate_at(2, DECAY))

    def linear(params, x):
        return nnx.merge(graphdef, params, {"weight_levels": levels, "act_levels": levels})(x, ctx)

    y, pullback = jax.vjp(linear, params, jnp.asarray(golden["x"]))
    grads, grad_x = pullback(jnp.asarray(golden["linear/cotangent"]))
    # The branch works in token space here and in weight space there: another order of sums.
    assert_close(y, golden["linear/y"], 4e-6)
    assert_close(grad_x, golden["linear/grad_x"], 4e-6)
    for key in keys:
        grad = grads[key].T if key == "kernel" else grads[key]
        assert_close(grad, golden[f"linear/grad_{names.get(key, key)}"], 4e-6)


def test_start_of_a_layer(golden, bits):
    config = QuantConfig.released(weight_bits=bits, act_bits=bits, rank=4)
    params, _ = quantize_params({"layer": {"kernel": golden["start/w"].T}}, ["layer"], config)
    layer = params["layer"]
    assert_close(layer["L"] @ layer["R"], golden["start/L"] @ golden["start/R"], 1e-5)
    # Columns may differ in sign.
    assert_close(jnp.abs(layer["L"]), abs(golden["start/L"]), 1e-5)
    assert_close(jnp.abs(layer["R"]), abs(golden["start/R"]), 1e-5)
    assert_close(layer["lower"], golden["start/lower"])
    assert_close(layer["upper"], golden["start/upper"])


def test_refactoring_at_a_phase_boundary(golden):
    left, right = refactor(jnp.asarray(golden["trained/L"]), jnp.asarray(golden["trained/R"]), 2)
    assert_close(jnp.abs(left[:, :2]), abs(golden["refactored/L"][:, :2]), 1e-5)
    assert_close(jnp.abs(right[:2]), abs(golden["refactored/R"][:2]), 1e-5)
    assert_close(left @ right, golden["refactored/L"][:, :2] @ golden["refactored/R"][:2], 1e-5)


def test_gate_over_the_phases(golden):
    gates = [gate_at(int(step), DECAY) for step in golden["gate_steps"]]
    assert_close(jnp.stack(gates), golden["gates"])


def test_clip_index_of_the_first_sample(golden):
    index = clip_index(jnp.asarray(golden["timesteps"], jnp.float32), "t_mod_50")
    assert int(index[0]) == int(golden["clip_index"])
