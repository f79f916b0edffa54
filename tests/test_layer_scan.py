"""Layers in bfloat16 run one after another as in `jax.lax.scan`, without a float32 copy of all."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.layer_scan import layer_scan

LAYERS, DIM = 16, 64


def loss(scan: Callable, layers: dict, x: jax.Array) -> jax.Array:
    def body(x: jax.Array, layer: dict) -> tuple[jax.Array, jax.Array]:
        y = jnp.matmul(x, layer["kernel"], preferred_element_type=jnp.float32) * layer["scale"]
        return jnp.tanh(y).astype(x.dtype), y.mean()

    x, means = scan(body, x, layers)
    return jnp.sum(x.astype(jnp.float32)) + means.sum()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_and_gradients_are_those_of_a_scan(dtype):
    rng = np.random.default_rng(0)
    layers = {
        "kernel": jnp.asarray(rng.standard_normal((LAYERS, DIM, DIM)) / 8, dtype),
        "scale": jnp.asarray(rng.uniform(0.5, 1, (LAYERS, DIM)), jnp.float32),
    }
    x = jnp.asarray(rng.standard_normal((8, DIM)), dtype)
    ours, scanned = (
        jax.jit(jax.value_and_grad(lambda *args, scan=scan: loss(scan, *args), (0, 1)))(layers, x)
        for scan in (layer_scan, jax.lax.scan)
    )
    # 2^-8: a gradient may round to bfloat16 at another place; float32 leaves no such choice.
    tolerance = 1e-6 if dtype == jnp.float32 else 2**-8

    def assert_close(a: jax.Array, b: jax.Array) -> None:
        assert a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)

    jax.tree.map(assert_close, ours, scanned)


def test_bfloat16_layers_are_not_copied_beside_themselves():
    layers = {
        "kernel": jax.ShapeDtypeStruct((LAYERS, DIM, DIM), jnp.bfloat16),
        "scale": jax.ShapeDtypeStruct((LAYERS, DIM), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((8, DIM), jnp.bfloat16)
    compiled = jax.jit(lambda *args: loss(layer_scan, *args)).lower(layers, x).compile()
    # One layer and the activations; the copy would be 4 * LAYERS * DIM**2.
    assert compiled.memory_analysis().temp_size_in_bytes < LAYERS * DIM**2
