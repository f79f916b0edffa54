"""Quantizers that are data: off they change nothing, on they are those of training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, Levels, QuantContext, QuantDense
from qvgen_jax.quant.switched import SwitchedDense, switched_off, switched_on, switched_params

NAME = "blocks.ffn.up"
CONFIG = QuantConfig(4, 4, rank=0, single_clip=(NAME,))
RNG = np.random.default_rng(0)
KERNELS = jnp.asarray(RNG.normal(size=(2, 12, 7)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(2, 5, 12)), jnp.float32)
BIAS = jnp.asarray(RNG.normal(size=(2, 7)), jnp.float32)


def states(config=CONFIG):
    plain = {"blocks": {"ffn": {"up": {"kernel": KERNELS, "bias": BIAS}}}}
    return switched_params(plain, [NAME], config)


def answer(layer, params, levels, block, x=X, config=CONFIG):
    """What a layer of this kind says with one block's state."""
    built = nnx.eval_shape(lambda: layer(NAME, 12, 7, config=config, key=jax.random.key(0)))
    graph, _, _ = nnx.split(built, nnx.Param, Levels)
    row = jax.tree.map(lambda leaf: leaf[block], (params, levels))
    return nnx.merge(graph, *(state["blocks"]["ffn"]["up"] for state in row))(x, QuantContext())


def plain(block, x=X):
    return x @ KERNELS[block] + BIAS[block]


def test_off_it_is_the_plain_linear():
    params, levels = states()
    found = answer(SwitchedDense, params, switched_off(levels, [NAME]), 0)
    # Two float32 sums over 12 inputs.
    np.testing.assert_allclose(found, plain(0), rtol=0, atol=1e-5)


def test_on_it_is_the_linear_of_training():
    params, levels = states()
    found, expected = (answer(layer, params, levels, 1) for layer in (SwitchedDense, QuantDense))
    # A product of values and one of codes: the same numbers, rounded elsewhere.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert np.abs(found - plain(1)).max() > 0.1


@pytest.mark.parametrize("bits", [(3, 0), (0, 3), (3, 8)])
def test_one_block_is_on_and_the_other_stays_off(bits):
    config = dataclasses.replace(CONFIG, weight_bits=bits[0] or 8, act_bits=bits[1] or 8)
    params, levels = states(config)
    on = switched_on(switched_off(levels, [NAME]), NAME, 1, bits)
    np.testing.assert_array_equal(
        on["blocks"]["ffn"]["up"]["weight_levels"], [0, 7 * bool(bits[0])]
    )
    np.testing.assert_allclose(answer(SwitchedDense, params, on, 0), plain(0), rtol=0, atol=1e-5)

    node = jax.tree.map(lambda leaf: np.asarray(leaf[1], np.float64), params)["blocks"]["ffn"]["up"]
    kernel, values = np.asarray(KERNELS[1], np.float64), np.asarray(X, np.float64)
    if bits[0]:
        codes = np.clip(np.rint(kernel / node["scale"] + node["zero_point"]), 0, 7)
        kernel = node["scale"] * (codes - node["zero_point"])
    if bits[1]:
        low, high = (f(values, -1, keepdims=True) for f in (np.min, np.max))
        scale = (np.maximum(high, 0) - np.minimum(low, 0)) / (2 ** bits[1] - 1)
        zero = np.rint(-np.minimum(low, 0) / scale)
        values = scale * (np.clip(np.rint(values / scale) + zero, 0, 2 ** bits[1] - 1) - zero)
    expected = values @ kernel + np.asarray(BIAS[1])
    np.testing.assert_allclose(answer(SwitchedDense, params, on, 1), expected, rtol=0, atol=1e-4)


def test_off_in_bfloat16_it_is_a_dense_of_the_same_type():
    params, levels = states()
    built = nnx.eval_shape(
        lambda: Dense(NAME, 12, 7, key=jax.random.key(0), dtype=jnp.bfloat16, cut=False)
    )
    graph, _ = nnx.split(built, nnx.Param)
    expected = nnx.merge(graph, {"kernel": KERNELS[0], "bias": BIAS[0]})(X)

    def layer(*arguments, **options):
        return SwitchedDense(*arguments, dtype=jnp.bfloat16, **options)

    found = answer(layer, params, switched_off(levels, [NAME]), 0)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))
