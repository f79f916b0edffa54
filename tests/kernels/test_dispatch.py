"""What the public functions hand to a backend and make of its answer.

On a v5e that is not here: its kernels are interpreted, everything above them is what runs on one.
"""

import logging
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import choose, tpu, xla
from kernels import quantized_matmul as public
from kernels.chips import CHIPS
from kernels.layouts import lay_out
from kernels.low_rank import LowRank
from kernels.operands import Weight
from kernels.quantize_tokens import dequantize_tokens, quantize_tokens
from kernels.quantized_matmul import quantize_and_matmul, quantized_matmul
from qvgen_jax.models import build_transformer, config_from_json
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from tests.models.test_packed_forward import WAN, inputs

V5E = CHIPS["v5e"]
LEVELS = jnp.float32(15)
# Of two samples; powers of two, which are exact in whatever order they are multiplied.
LOWER = jnp.asarray([1, 0.5]).reshape(2, 1, 1)
UPPER = jnp.asarray([0.25, 1]).reshape(2, 1, 1)


@pytest.fixture
def calls(monkeypatch):
    """Names of the TPU kernels that ran, in order."""
    made = []

    def interpreted(name, *operands, **how):
        made.append(name)
        return kernels[name](*operands, chip=V5E, interpret=True, **how)

    kernels = {name: getattr(tpu, name) for name in ("quantized_matmul", "quantize_and_matmul")}
    for name in kernels:
        monkeypatch.setattr(tpu, name, partial(interpreted, name))
    for module in (public, tpu):
        monkeypatch.setattr(module, "target", lambda: V5E)
    monkeypatch.setattr(choose, "_said", set())
    return made


def operands(inner, shape=(2, 9), columns=70):
    """Floats, and a weight in the layout of a TPU."""
    rng = np.random.default_rng(inner)
    x = rng.standard_normal((*shape, inner), np.float32) + np.float32(0.3)
    codes = rng.integers(-8, 8, (inner, columns), np.int8)
    scale, zero_point = rng.uniform(0.1, 1, columns), rng.uniform(-8, 7, columns)
    bias = rng.standard_normal(columns)
    rows = [np.float32(row) for row in (scale, zero_point, codes.sum(0, dtype=np.int64), bias)]
    return jnp.asarray(x), Weight(lay_out(codes, 4, "rows"), *rows)


def tokens_of(x):
    shape = (2, *[1] * (x.ndim - 1))
    return quantize_tokens(x, LOWER.reshape(shape), UPPER.reshape(shape), LEVELS)


def close(found, expected):
    """Integers are equal; the float32 corrections may be fused differently."""
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * float(abs(expected).max()))


ON_TPU = {"backend": "tpu", "layout": "rows", "bits": (4, 4)}


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize(("inner", "shape"), [(129, (2, 9)), (64, (2, 3, 5))])
def test_ready_tokens_reach_the_chips_kernel_and_come_back_whole(calls, inner, shape, compile_it):
    x, weight = operands(inner, shape)
    run = partial(quantized_matmul, **ON_TPU)
    y = (jax.jit(run) if compile_it else run)(tokens_of(x), weight)
    assert calls == ["quantized_matmul"]
    assert y.shape == (*shape, 70)
    close(y, xla.quantized_matmul(tokens_of(x), weight))


@pytest.mark.parametrize("compile_it", [False, True])
@pytest.mark.parametrize(("inner", "shape"), [(129, (2, 9)), (64, (2, 3, 5))])
def test_floats_are_quantized_on_the_way_with_the_clips_of_their_sample(
    calls, inner, shape, compile_it
):
    x, weight = operands(inner, shape)
    ends = (2, *[1] * (x.ndim - 1))
    run = partial(quantize_and_matmul, **ON_TPU)
    run = jax.jit(run) if compile_it else run
    y = run(x, LOWER.reshape(ends), UPPER.reshape(ends), LEVELS, weight)
    assert calls == ["quantize_and_matmul"]
    close(y, xla.quantized_matmul(tokens_of(x), weight))


def test_options_of_the_range_reach_the_prologue(calls):
    x, weight = operands(129)
    how = {"include_zero": False, "clip_ratio": 0.5}
    x = x + 4
    y = quantize_and_matmul(x, LOWER, UPPER, LEVELS, weight, **how, **ON_TPU)
    assert calls == ["quantize_and_matmul"]
    close(y, xla.quantized_matmul(quantize_tokens(x, LOWER, UPPER, LEVELS, **how), weight))


def test_a_range_in_bfloat16_is_made_before_the_product(calls):
    x, weight = operands(129)
    how = {"range_dtype": jnp.bfloat16}
    y = quantize_and_matmul(x, LOWER, UPPER, LEVELS, weight, **how, **ON_TPU)
    assert calls == ["quantized_matmul"]
    close(y, xla.quantized_matmul(quantize_tokens(x, LOWER, UPPER, LEVELS, **how), weight))


def test_a_branch_is_added_before_the_one_rounding(calls):
    x, weight = operands(64)
    rng = np.random.default_rng(2)
    left, right, gate = (rng.standard_normal(s, np.float32) for s in ((70, 3), (3, 64), 3))
    branch = LowRank(left, right, gate)
    y = quantized_matmul(tokens_of(x), weight, branch, out_dtype=jnp.bfloat16, **ON_TPU)
    assert calls == ["quantized_matmul"]
    added = np.float32(dequantize_tokens(tokens_of(x))) @ (left * gate @ right).T
    expected = np.float32(xla.quantized_matmul(tokens_of(x), weight)) + added
    assert y.dtype == jnp.bfloat16
    # 2^-8 of a rounding to bfloat16, and of the branch's own product, made in bfloat16.
    atol = 2**-7 * abs(expected).max()
    np.testing.assert_allclose(np.float32(y), expected, rtol=2**-8, atol=atol)


@pytest.mark.parametrize(
    ("how", "shape", "reason"),
    [
        ({"layout": "columns"}, (2, 9), "it wants codes in layout 'rows', not 'columns'"),
        ({"backend": "hopper"}, (2, 9), "it has no kernel for v5e"),
        ({"bits": (4, 9)}, (2, 9), "W4A9: expected 2 to 8 bits"),
    ],
)
def test_what_the_chip_does_not_take_is_xlas_and_said_once(calls, caplog, how, shape, reason):
    x, weight = operands(64, shape)
    how = ON_TPU | how
    if how["layout"] == "columns":
        weight = weight._replace(codes=weight.codes.T)
    with caplog.at_level(logging.WARNING, "kernels"):
        y, again = (quantized_matmul(tokens_of(x), weight, **how) for _ in range(2))
    rows, (bits, acts) = shape[0] * shape[1], how["bits"]
    product = f"{rows} x 64 x 70 W{bits}A{acts} to float32"
    line = f"{how['backend']} does not take {product}: {reason}; XLA does"
    assert [record.message for record in caplog.records] == [line]
    assert not calls
    expected = xla.quantized_matmul(tokens_of(x), weight, layout=how["layout"])
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(again, expected)


def test_few_rows_are_xlas_without_a_word(calls, caplog):
    x, weight = operands(64, (2, 7))
    with caplog.at_level(logging.WARNING, "kernels"):
        y = quantized_matmul(tokens_of(x), weight, **ON_TPU)
    assert not caplog.records
    assert not calls
    np.testing.assert_array_equal(y, xla.quantized_matmul(tokens_of(x), weight))


def random_params(node, rng):
    """Like a tree of shapes: codes and their sums, clips all over 0 to 1, small the rest."""

    def draw(name, like):
        width = {"lower": 2, "upper": 2}.get(name, 0.1)
        return jnp.asarray(width * rng.standard_normal(like.shape, np.float32))

    if "codes" not in node:
        return {
            name: random_params(child, rng) if isinstance(child, dict) else draw(name, child)
            for name, child in node.items()
        }
    drawn = {name: draw(name, like) for name, like in node.items()}
    codes = rng.integers(-8, 8, node["codes"].shape, np.int8)
    code_sum = codes.sum(-2, dtype=np.int64).astype(np.float32)
    return drawn | {
        "codes": jnp.asarray(codes, jnp.int4),
        "scale": jnp.asarray(rng.uniform(0.02, 0.04, code_sum.shape), jnp.float32),
        "zero_point": jnp.asarray(rng.uniform(6, 9, code_sum.shape), jnp.float32),
        "code_sum": jnp.asarray(code_sum),
    }


@pytest.mark.slow
def test_a_whole_model_on_the_chips_backend_is_the_one_on_xla(calls):
    quant, config = QuantConfig(rank=0), config_from_json(WAN)

    def split(backend):
        dense = dense_factory(quant, "packed", backend=backend, chip=V5E)
        key = jax.random.key(0)
        built = nnx.eval_shape(
            lambda: build_transformer(config, key=key, dense=dense, dtype=jnp.float32, remat="none")
        )
        return nnx.split(built, nnx.Param, Levels)

    (on_tpu, shapes, levels), (on_xla, _, _) = split("auto"), split("xla")
    params = random_params(nnx.to_pure_dict(shapes), np.random.default_rng(0))
    levels = jax.tree.map(lambda like: jnp.full(like.shape, 15, like.dtype), levels)

    @partial(jax.jit, static_argnums=0)
    def run(graph, params):
        return nnx.merge(graph, params, levels)(*inputs(config, jnp.float32))

    found, expected = run(on_tpu, params), run(on_xla, params)
    # Of the one body of both blocks: q, k, v and their output, the query to the text and its
    # output, the MLP's two; and the last linear. Timesteps and text have too few rows.
    assert calls == ["quantize_and_matmul"] * 9
    # Float32 in another order; a code off by one would move its token by more than 1e-3.
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))
