"""QuantDense: a linear whose training forward is its inference forward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.chips import CHIPS
from kernels.choose import layout_of as layout_for
from kernels.low_rank import LowRank, low_rank_matmul
from kernels.operands import Product
from kernels.quantize_tokens import dequantize_tokens, quantize_tokens
from qvgen_jax.quant.apply import apply_each, apply_to_gelu
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, Levels, QuantContext, QuantDense, branch_in_weights
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import drop_branch
from qvgen_jax.quant.packed import pack_layer, unpack_layer
from qvgen_jax.quant.packed_dense import PackedDense
from qvgen_jax.quant.schedule import RankDecay, gate_at
from qvgen_jax.quant.tokens import clip_multipliers, fake_quantize_tokens
from qvgen_jax.quant.weights import fake_quantize_weight

IN, OUT = 19, 13
INDEX = jnp.asarray([3, 41], jnp.int32)


def definition(config, layer=QuantDense, dtype=jnp.float32):
    built = nnx.eval_shape(
        lambda: layer("a", IN, OUT, config=config, key=jax.random.key(0), dtype=dtype)
    )
    return nnx.split(built, nnx.Param, Levels)[0]


def quantized_layer(config, key=0):
    """Params and levels with clips moved apart, so that both ends are clipped."""
    keys = jax.random.split(jax.random.key(key), 4)
    plain = {
        "kernel": jax.random.normal(keys[0], (IN, OUT)) / IN**0.5,
        "bias": jax.random.normal(keys[1], (OUT,)),
    }
    params, levels = quantize_params({"a": plain}, ["a"], config)
    layer = params["a"]
    for name, k in (("lower", keys[2]), ("upper", keys[3])):
        layer[name] = layer[name] - 2 + jax.random.normal(k, layer[name].shape)
    return layer, levels["a"]


def layout_of(bits):
    """Of a packed layer on a CPU."""
    return layout_for("xla", Product(None, IN, OUT, bits, bits), CHIPS["cpu"])


def tokens_of(key=9, shape=(2, 7, IN), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(key), shape, dtype)


def weight_space(layer, levels, x, gate):
    """The release's form, in the oracle's role: `Xq (What + (gate L) R)^T + b`."""
    lower, upper = (clip_multipliers(layer[k], INDEX, x.ndim) for k in ("lower", "upper"))
    values, _ = fake_quantize_tokens(x, lower, upper, levels["act_levels"], range_dtype=x.dtype)
    weight = [layer[k] for k in ("kernel", "scale", "zero_point")]
    kernel = fake_quantize_weight(*weight, levels["weight_levels"])
    if gate is not None:
        kernel = kernel + ((layer["L"] * gate) @ layer["R"]).T
    return jnp.matmul(values, kernel, precision="highest") + layer["bias"]


@pytest.mark.parametrize("bits", [(4, 4), (3, 3), (2, 8)])
@pytest.mark.parametrize("gate", [None, 0.3])
def test_float64_forward_and_gradients_equal_the_weight_space_oracle(bits, gate):
    with jax.enable_x64(True):
        config = QuantConfig(*bits, rank=4, product_dtype="float64")
        layer, levels = quantized_layer(config)
        layer = jax.tree.map(lambda a: a.astype(jnp.float64), layer)
        gate = None if gate is None else jnp.asarray([1, 1, gate, gate], jnp.float64)
        x = tokens_of(dtype=jnp.float64)
        cotangent = jax.random.normal(jax.random.key(4), (2, 7, OUT), jnp.float64)
        graphdef = definition(config, dtype=jnp.float64)

        def ours(layer, x):
            return nnx.merge(graphdef, layer, levels)(x, QuantContext(INDEX, gate))

        y, pullback = jax.vjp(ours, layer, x)
        expected, oracle = jax.vjp(lambda layer, x: weight_space(layer, levels, x, gate), layer, x)
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-9)
        for got, wanted in zip(
            jax.tree.leaves(pullback(cotangent)), jax.tree.leaves(oracle(cotangent)), strict=True
        ):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-9)


def test_codes_that_differ_from_the_oracle_lay_at_a_rounding_boundary():
    """In float32 another order of sums moves values by 1e-6: that is all that may flip a code."""
    config = QuantConfig(rank=4)
    layer, levels = quantized_layer(config)
    gate, x = jnp.ones(4), tokens_of(shape=(2, 500, IN))
    integer = nnx.merge(definition(config), layer, levels)(x, QuantContext(INDEX, gate))
    oracle = weight_space(layer, levels, x, gate)
    np.testing.assert_allclose(integer, oracle, atol=1e-5)
    one = jnp.float32(1)
    ours, theirs = (quantize_tokens(y, one, one, levels["act_levels"]) for y in (integer, oracle))
    ratio = np.asarray(integer / ours.scale)
    to_boundary = np.abs(np.abs(ratio - np.round(ratio)) - 0.5)
    # The integer zero point has such a boundary too, shared by its token.
    ends = np.asarray(jnp.minimum(integer.min(-1, keepdims=True), 0) / ours.scale)
    to_boundary = np.minimum(to_boundary, np.abs(np.abs(ends - np.round(ends)) - 0.5))
    differ = np.asarray(ours.codes != theirs.codes)
    assert np.all(to_boundary[differ] < 1e-4)
    assert differ.mean() < 1e-3


@pytest.mark.parametrize("product_dtype", ["bfloat16", "float32"])
def test_the_product_type_changes_no_bit(product_dtype):
    layer, levels = quantized_layer(QuantConfig(rank=0))
    y, int8 = (
        nnx.merge(definition(QuantConfig(rank=0, product_dtype=kind)), layer, levels)(
            tokens_of(), QuantContext(INDEX)
        )
        for kind in (product_dtype, "int8")
    )
    np.testing.assert_array_equal(y, int8)


def test_full_rank_branch_undoes_weight_quantization():
    config = QuantConfig(rank=OUT)
    layer, levels = quantized_layer(config)
    x = tokens_of()
    y = nnx.merge(definition(config), layer, levels)(x, QuantContext(INDEX, jnp.ones(OUT)))
    lower, upper = (clip_multipliers(layer[k], INDEX, x.ndim) for k in ("lower", "upper"))
    values = dequantize_tokens(quantize_tokens(x, lower, upper, levels["act_levels"]))
    np.testing.assert_allclose(y, values @ layer["kernel"] + layer["bias"], atol=1e-5)


def test_halving_the_rank_keeps_the_output_when_the_gate_is_zero():
    config = QuantConfig(rank=8)
    layer, levels = quantized_layer(config)
    gate = jnp.asarray([1.0] * 4 + [0.0] * 4)
    y = nnx.merge(definition(config), layer, levels)(tokens_of(), QuantContext(INDEX, gate))
    half = {**layer, "L": layer["L"][:, :4], "R": layer["R"][:4]}
    halved = nnx.merge(definition(QuantConfig(rank=4)), half, levels)
    other = halved(tokens_of(), QuantContext(INDEX, gate[:4]))
    np.testing.assert_allclose(y, other, rtol=0, atol=1e-6)


def test_dropping_a_closed_branch_is_exact():
    config = QuantConfig(rank=8)
    layer, levels = quantized_layer(config)
    closed = QuantContext(INDEX, jnp.zeros(8))
    y = nnx.merge(definition(config), layer, levels)(tokens_of(), closed)
    dropped = nnx.merge(definition(QuantConfig(rank=0)), drop_branch({"a": layer})["a"], levels)
    np.testing.assert_array_equal(y, dropped(tokens_of(), QuantContext(INDEX)))


def test_dead_columns_and_the_gate_get_no_gradient():
    config = QuantConfig(rank=8)
    layer, levels = quantized_layer(config)
    graphdef = definition(config)

    def loss(layer, gate):
        y = nnx.merge(graphdef, layer, levels)(tokens_of(), QuantContext(INDEX, gate))
        return jnp.sum(y**2)

    grads, d_gate = jax.grad(loss, (0, 1))(layer, gate_at(15, RankDecay(10, rank=8)))
    np.testing.assert_array_equal(d_gate, 0)
    np.testing.assert_array_equal(grads["L"][:, 4:], 0)
    np.testing.assert_array_equal(grads["R"][4:], 0)
    assert jnp.all(jnp.any(grads["L"][:, :4] != 0, axis=0))


def test_all_phases_are_one_compilation():
    config = QuantConfig(rank=8)
    layer, levels = quantized_layer(config)
    graphdef, decay, traces = definition(config), RankDecay(10, rank=8), []

    @jax.jit
    def run(step):
        traces.append(step)
        ctx = QuantContext(INDEX, gate_at(step, decay))
        return nnx.merge(graphdef, layer, levels)(tokens_of(), ctx)

    for step in (0, 10, 25, 39, 40):
        assert jnp.isfinite(run(step)).all()
    assert len(traces) == 1


@pytest.mark.parametrize("bits", [4, 3, 8])
@pytest.mark.parametrize("config", [QuantConfig, QuantConfig.released])
def test_the_packed_layer_computes_the_same_bits(bits, config):
    config = config(weight_bits=bits, act_bits=bits, rank=0)
    layer, levels = quantized_layer(config)
    x, ctx = tokens_of(), QuantContext(INDEX)
    y = nnx.merge(definition(config), layer, levels)(x, ctx)
    packed = unpack_layer(pack_layer(layer, bits), bits, IN, layout_of(bits))
    np.testing.assert_array_equal(
        nnx.merge(definition(config, PackedDense), packed, levels)(x, ctx), y
    )


def test_the_packed_layer_with_a_branch_computes_the_same_bits():
    config, gate = QuantConfig(rank=4), jnp.asarray([1, 1, 0.3, 0], jnp.float32)
    layer, levels = quantized_layer(config)
    x = tokens_of()
    y = nnx.merge(definition(config), layer, levels)(x, QuantContext(INDEX, gate))
    tensors = pack_layer(layer, 4) | {"L": layer["L"], "R": layer["R"], "gate": gate}
    packed = unpack_layer(tensors, 4, IN, layout_of(4))
    linear = nnx.merge(definition(config, PackedDense), packed, levels)
    # The gate saved with the layer counts, not the step's.
    np.testing.assert_array_equal(linear(x, QuantContext(INDEX, jnp.zeros(4))), y)


@pytest.mark.parametrize("form", [QuantDense, PackedDense])
def test_tokens_already_quantized_are_accepted(form):
    config = QuantConfig(rank=0)
    layer, levels = quantized_layer(config)
    x = tokens_of()
    lower, upper = (clip_multipliers(layer[k], INDEX, x.ndim) for k in ("lower", "upper"))
    tokens = quantize_tokens(x, lower, upper, levels["act_levels"])
    packed = unpack_layer(pack_layer(layer, 4), 4, IN, layout_of(4))
    params = layer if form is QuantDense else packed
    linear = nnx.merge(definition(config, form), params, levels)
    np.testing.assert_array_equal(linear(tokens), linear(x, QuantContext(INDEX)))


def test_bfloat16_compute_keeps_float32_masters_and_agrees_to_its_precision():
    config = QuantConfig(rank=4)
    layer, levels = quantized_layer(config)
    ctx, x = QuantContext(INDEX, jnp.ones(4)), tokens_of().astype(jnp.bfloat16)
    exact = nnx.merge(definition(config), layer, levels)(x.astype(jnp.float32), ctx)
    graphdef = definition(config, dtype=jnp.bfloat16)
    y = nnx.merge(graphdef, layer, levels)(x, ctx)
    grads = jax.grad(
        lambda p: jnp.sum(nnx.merge(graphdef, p, levels)(x, ctx).astype(jnp.float32) ** 2)
    )(layer)
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}
    # The codes are the same; the branch and the output are rounded to 8 bits.
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=2e-2)


def test_layers_of_one_stack_may_differ_in_bits():
    config = QuantConfig(8, 8, rank=0)
    layer, levels = quantized_layer(config)
    coarse = {"weight_levels": jnp.float32(15), "act_levels": jnp.float32(15)}
    low = quantized_layer(QuantConfig(4, 4, rank=0))[0]
    graphdef, ctx = definition(config), QuantContext(INDEX)
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), (layer, levels), (low, coarse))

    def body(x, state):
        return x, nnx.merge(graphdef, *state)(x, ctx)

    _, both = jax.lax.scan(body, tokens_of(), stack)
    np.testing.assert_allclose(
        both[0], nnx.merge(graphdef, layer, levels)(tokens_of(), ctx), atol=1e-5
    )
    np.testing.assert_allclose(
        both[1], nnx.merge(graphdef, low, coarse)(tokens_of(), ctx), atol=1e-5
    )


def test_the_factory_builds_each_layer_as_the_config_wants_it():
    config = QuantConfig(rank=2, bits={"b": (8, 3)}, full_precision=("c",), single_clip=("a",))
    arguments = {"key": jax.random.key(0), "dtype": jnp.float32}
    train, packed = dense_factory(config, "train"), dense_factory(config, "packed")
    assert isinstance(train("a", 4, 5, **arguments), QuantDense)
    assert isinstance(train("c", 4, 5, **arguments), Dense)
    assert isinstance(dense_factory(config, "plain")("a", 4, 5, **arguments), Dense)
    assert train("a", 4, 5, **arguments).lower[...].shape == (1,)
    assert float(train("b", 4, 5, **arguments).act_levels[...]) == 7
    assert (packed("b", 4, 5, **arguments).layout, packed("a", 4, 5, **arguments).layout) == (
        "rows",
        "rows_halved",
    )
    assert packed("b", 4, 5, **arguments).codes[...].shape == (4, 5)
    assert packed("a", 4, 5, **arguments).codes[...].shape == (2, 5)
    with pytest.raises(ValueError, match="form='fast'"):
        dense_factory(config, "fast")


def test_the_branch_in_weight_space_is_the_branch_in_token_space():
    keys = jax.random.split(jax.random.key(5), 3)
    values = jax.random.normal(keys[0], (2, 5, IN))
    left, right = jax.random.normal(keys[1], (OUT, 4)), jax.random.normal(keys[2], (4, IN))
    gate = jnp.asarray([1, 1, 0.3, 0])

    def loss(space, left, right):
        return jnp.sum(jnp.sin(space(values, LowRank(left, right, gate))))

    for found, expected in zip(
        jax.value_and_grad(lambda *b: loss(branch_in_weights, *b), (0, 1))(left, right),
        jax.value_and_grad(lambda *b: loss(low_rank_matmul, *b), (0, 1))(left, right),
        strict=True,
    ):
        # float32 products in another order.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, expected)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_a_gpu_s_layers_compute_the_same_bits_where_there_is_no_gpu(backend):
    config = QuantConfig(rank=0)
    x, ctx = jax.random.normal(jax.random.key(3), (2, 11, IN)), QuantContext(INDEX)
    layers, expected = [], []
    for key in range(3):
        layer, levels = quantized_layer(config, key)
        expected.append(nnx.merge(definition(config), layer, levels)(x, ctx))
        graph = nnx.split(
            nnx.eval_shape(
                lambda: PackedDense(
                    "a",
                    IN,
                    OUT,
                    config=config,
                    key=jax.random.key(0),
                    backend=backend,
                    chip=CHIPS["h100"],
                )
            ),
            nnx.Param,
            Levels,
        )[0]
        layout = layout_for(backend, Product(None, IN, OUT), CHIPS["h100"])
        packed = unpack_layer(pack_layer(layer, 4), 4, IN, layout)
        layers.append(nnx.merge(graph, packed, levels))
    assert {layer.backend for layer in layers} == {backend}
    for found, wanted in zip(apply_each(layers, x, ctx), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    behind = layers[0](jax.nn.gelu(x, approximate=True), ctx)
    np.testing.assert_array_equal(apply_to_gelu(layers[0], x, ctx), behind)
