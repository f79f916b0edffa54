"""Packed weights times floats equal the product with what they stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.layouts import LAYOUTS, lay_out
from kernels.operands import Weight
from kernels.weight_only_matmul import weight_only_matmul


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("rows", "inner"), [(1, 37), (2, 64)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_product_is_that_of_the_dequantized_weight(layout, rows, inner, symmetric):
    keys = jax.random.split(jax.random.key(inner), 5)
    codes = jax.random.randint(keys[0], (inner, 11), -8, 8, jnp.int8)
    scale = jax.random.uniform(keys[1], (11,), jnp.float32, 0.01, 0.1)
    zero_point = None if symmetric else jax.random.normal(keys[2], (11,))
    bias = jax.random.normal(keys[3], (11,))
    x = jax.random.normal(keys[4], (rows, inner))
    weight = Weight(lay_out(codes, 4, layout), scale, zero_point, jnp.sum(codes, 0), bias)
    kernel = scale * (codes - (0 if symmetric else zero_point))
    found = weight_only_matmul(x, weight, layout=layout, out_dtype=jnp.float32)
    # Float32 sums in another order.
    np.testing.assert_allclose(found, x @ kernel + bias, atol=1e-4)


def test_bfloat16_tokens_meet_exact_codes():
    x = jnp.asarray([[1.5, -2.0, 0.25]], jnp.bfloat16)
    codes = jnp.asarray([[7], [-8], [3]], jnp.int8)
    weight = Weight(codes, jnp.ones(1), None, jnp.sum(codes, 0))
    found = weight_only_matmul(x, weight, out_dtype=jnp.float32)
    assert float(found[0, 0]) == 1.5 * 7 + 2 * 8 + 0.25 * 3
