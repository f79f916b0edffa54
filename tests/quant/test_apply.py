"""Linears behind a norm: whoever computes it, the layers see the same tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.chips import CHIPS
from kernels.fused_quantize import Normalized, quantize_normalized
from qvgen_jax.quant import apply
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, QuantContext, QuantDense
from qvgen_jax.quant.packed_dense import PackedDense

IN, OUT = 24, 10
CTX = QuantContext(jnp.asarray([3, 41], jnp.int32))


def tokens_of(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    scale, shift = (jax.random.normal(key, (2, 1, IN)) for key in keys[1:])
    x = jax.random.normal(keys[0], (2, 7, IN), dtype)
    return Normalized(x, 1e-6, dtype, scale=scale, shift=shift)


def layers_of(layer, count=3, **options):
    keys = jax.random.split(jax.random.key(1), count)
    return [layer("a", IN, OUT, key=key, **options) for key in keys]


def on_hopper(config, **options):
    """With random codes."""
    options |= {"config": config, "backend": "hopper", "chip": CHIPS["h100"]}
    made = layers_of(PackedDense, **options)
    for number, layer in enumerate(made):
        key, codes = jax.random.key(number), layer.codes[...]
        layer.codes[...] = jax.random.randint(key, codes.shape, -8, 8, jnp.int8).astype(codes.dtype)
        layer.lower[...] = layer.lower[...] - number
    return made


@pytest.fixture
def fused(monkeypatch):
    """How many clips each call of the quantizer behind a norm was for."""
    calls = []

    def spy(tokens, clips, levels, **how):
        calls.append(len(clips))
        return quantize_normalized(tokens, clips, levels, **how)

    monkeypatch.setattr(apply, "quantize_normalized", spy)
    return calls


def check(layers, dtype=jnp.float32):
    tokens = tokens_of(dtype)
    found = apply.apply_normalized(layers, tokens, CTX)
    for y, layer in zip(found, layers, strict=True):
        np.testing.assert_array_equal(y, layer(tokens.values(), CTX))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_quantizer_serves_the_packed_layers_of_a_gpu(fused, dtype):
    layers = on_hopper(QuantConfig(rank=0), dtype=dtype)
    check(layers, dtype)
    check(layers[:1], dtype)
    assert fused == [3, 1]


@pytest.mark.parametrize(
    "options", [{"rotation": "hadamard"}, {"smoothing": 0.5}, {"range_dtype": "tensor"}]
)
def test_what_comes_between_norm_and_codes_keeps_its_place(fused, options):
    check(on_hopper(QuantConfig(rank=0, **options)))
    # A range in the tensor's dtype is the quantizer's own affair: it computes the values itself.
    assert fused == ([3] if "range_dtype" in options else [])


def test_training_is_the_layers_of_the_norm_s_values_and_differentiable(fused):
    check(layers_of(Dense))
    layers = layers_of(QuantDense, config=QuantConfig(rank=0))
    for layer in layers:
        layer.scale[...] = jnp.full((OUT,), 0.05)  # At 1 every code would be 0.
    check(layers)
    graph, state = nnx.split(layers)

    def loss(x, one_read):
        tokens = Normalized(x, 1e-6, jnp.float32)
        merged = nnx.merge(graph, state)
        if one_read:
            return sum(y.sum() for y in apply.apply_normalized(merged, tokens, CTX))
        return sum(layer(tokens.values(), CTX).sum() for layer in merged)

    x = tokens_of().x
    found, expected = jax.grad(loss)(x, True), jax.grad(loss)(x, False)
    np.testing.assert_allclose(found, expected, atol=1e-5)  # sums in another order
    assert abs(found).max() > 0
    assert fused == []
