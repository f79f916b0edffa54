"""What is measured of tokens behind which others were padded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.ptq.statistics import GRAM, some_rows
from qvgen_jax.quant.calibration import MAXIMA, MEANS, Measure, observe
from qvgen_jax.quant.dense import QuantContext

REAL, PADDED, WIDTH = 5, 8, 3


@pytest.mark.parametrize(
    "measure",
    [MAXIMA, MEANS, GRAM, some_rows(4, seed=0), some_rows(20, seed=0)],
    ids=["maxima", "means", "gram", "few rows", "many rows"],
)
def test_padding_is_not_measured(measure: Measure):
    """In float32: the sums of fewer terms differ by rounding."""
    x = jax.random.normal(jax.random.key(0), (2, REAL, WIDTH))
    louder = jnp.concatenate([x, jnp.full((2, PADDED - REAL, WIDTH), 100.0)], axis=1)
    ctx = QuantContext().padded(louder, REAL)
    probe = jnp.zeros(measure.shape(WIDTH))

    def total(probe: jax.Array, x: jax.Array, tokens: jax.Array | None) -> jax.Array:
        return jnp.sum(observe(x, probe, tokens, measure))

    found = jax.jit(jax.grad(total))(probe, louder, ctx.tokens)
    np.testing.assert_allclose(found, jax.grad(total)(probe, x, None), rtol=1e-6)
    assert ctx.padded(x, REAL) == ctx
    assert ctx.unpadded().tokens is None
