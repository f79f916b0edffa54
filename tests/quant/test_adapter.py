"""An adapter merged into the weight before it is quantized (EfficientDM): nothing is left of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels, QuantContext, QuantDense
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import merge_adapter, merge_adapters

IN, OUT, RANK = 19, 13, 4
MERGED = QuantConfig(rank=RANK, branch_space="merged", buckets=1)
PLAIN = QuantConfig(rank=0, buckets=1)
CTX = QuantContext(gate=jnp.ones(RANK))


def drawn(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / IN**0.5


def layer(quant: QuantConfig, params: dict, levels: dict) -> nnx.Module:
    built = nnx.eval_shape(lambda: QuantDense("a", IN, OUT, config=quant, key=jax.random.key(0)))
    return nnx.merge(nnx.split(built, nnx.Param, Levels)[0], params, levels)


@pytest.fixture
def trained() -> tuple[dict, dict]:
    """Params and levels of a layer whose adapter has moved weights by about a step."""
    plain = {"kernel": drawn(IN, OUT), "bias": drawn(OUT, seed=1)}
    params, levels = quantize_params({"a": plain}, ["a"], MERGED)
    left = 0.3 * drawn(OUT, RANK, seed=2)
    return {**params["a"], "L": left}, levels["a"]


def test_a_merged_adapter_equals_the_merged_weight(trained):
    params, levels = trained
    x = drawn(2, 5, IN, seed=3)
    without = {name: leaf for name, leaf in params.items() if name not in "LR"}
    dense = np.asarray(params["L"], np.float64) @ np.asarray(params["R"], np.float64)
    moved = {**without, "kernel": merge_adapter(params["kernel"], params["L"], params["R"])}
    np.testing.assert_allclose(moved["kernel"], params["kernel"] + dense.T, atol=1e-6)
    found = layer(MERGED, params, levels)(x, CTX)
    np.testing.assert_array_equal(found, layer(PLAIN, moved, levels)(x))
    # It does something: codes have moved, and are not those of the teacher's weight.
    assert np.abs(found - layer(PLAIN, without, levels)(x)).max() > 0.05


def test_its_gradient_is_the_merged_weights_by_the_chain_rule(trained):
    params, levels = trained
    x, y = drawn(2, 5, IN, seed=3), drawn(2, 5, OUT, seed=4)

    def loss(quant: QuantConfig, params: dict) -> jax.Array:
        return jnp.sum(jnp.square(layer(quant, params, levels)(x, CTX) - y))

    found = jax.grad(lambda params: loss(MERGED, params))(params)
    moved = merge_adapters({"a": params})["a"]
    of_weight = jax.grad(lambda params: loss(PLAIN, params))(moved)["kernel"]
    np.testing.assert_allclose(found["L"], of_weight.T @ params["R"].T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["R"], params["L"].T @ of_weight.T, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["kernel"], of_weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stack", [(), (3,)])
def test_at_step_0_it_changes_nothing_and_every_layer_has_its_own(stack):
    kernel = drawn(*stack, IN, OUT)
    names = ["a", "b"]
    teacher = {name: {"kernel": kernel} for name in names}
    params, _ = quantize_params(teacher, names, MERGED)
    plain, _ = quantize_params(teacher, names, PLAIN)
    for name in names:
        merged = merge_adapters(params)[name]
        jax.tree.map(np.testing.assert_array_equal, merged, plain[name])
        assert params[name]["R"].shape == (*stack, RANK, IN)
        assert np.abs(params[name]["R"]).max() <= IN**-0.5
    assert not np.array_equal(params["a"]["R"], params["b"]["R"])
    other, _ = quantize_params(teacher, names, MERGED, seed=1)
    assert not np.array_equal(params["a"]["R"], other["a"]["R"])


def test_of_a_stack_every_layer_has_its_own_product():
    sides = {"kernel": drawn(3, IN, OUT), "L": drawn(3, OUT, RANK, seed=1)}
    sides["R"] = drawn(3, RANK, IN, seed=2)
    found = merge_adapters({"a": sides})["a"]
    assert set(found) == {"kernel"}
    kernel, left, right = (np.asarray(x, np.float64) for x in sides.values())
    expected = kernel + np.einsum("lor,lri->lio", left, right)
    np.testing.assert_allclose(found["kernel"], expected, atol=1e-6)  # Float32, sums of 4.


def test_no_token_passes_it():
    assert (MERGED.token_rank, MERGED.merged) == (0, True)
    assert QuantConfig(rank=RANK).token_rank == RANK
