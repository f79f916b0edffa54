"""Long attention, a head and a chunk at a time, is the same function as the short one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.models import attention as module


@pytest.mark.parametrize("keys", [7, 40])
def test_chunks_of_queries_equal_the_whole_in_value_and_gradient(keys, monkeypatch):
    # 1e-5: both take their softmax in float32, in another order of summation.
    rng = np.random.default_rng(0)
    query, out = (jnp.asarray(rng.standard_normal((2, 300, 3, 8)), jnp.float32) for _ in range(2))
    key, value = (jnp.asarray(rng.standard_normal((2, keys, 3, 8)), jnp.float32) for _ in range(2))

    def loss(query, key, value):
        return jnp.sum(out * module.attention(query, key, value, scale=0.3))

    whole = jax.value_and_grad(loss, (0, 1, 2))(query, key, value)
    monkeypatch.setattr(module, "_LOGITS", 130 * keys)  # Three chunks of 100.
    chunked = jax.value_and_grad(loss, (0, 1, 2))(query, key, value)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole, chunked
    )
