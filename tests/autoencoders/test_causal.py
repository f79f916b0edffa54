"""Causal convolutions: a clip in chunks is the clip in one pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.autoencoders.causal import CausalConv, run_chunks


class Two(nnx.Module):
    def __init__(self, repeat_first: bool):
        k1, k2 = jax.random.split(jax.random.key(0))
        window, options = (3, 3, 3), {"dtype": jnp.float32, "repeat_first": repeat_first}
        self.first = CausalConv(2, 3, window, key=k1, **options)
        self.second = CausalConv(3, 2, window, key=k2, **options)

    def __call__(self, x, past):
        return self.second(jax.nn.silu(self.first(x, past)), past)


@functools.cache
def net(repeat_first):
    return Two(repeat_first)


def run(repeat_first, x, first, chunk):
    two = net(repeat_first)
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda x: run_chunks(two, x, first, chunk))(x)


@pytest.mark.parametrize("repeat_first", [False, True])
@pytest.mark.parametrize(("first", "chunk"), [(1, 1), (3, 2)])
def test_chunks_of_any_size_equal_one_pass(repeat_first, first, chunk):
    x = jax.random.normal(jax.random.key(1), (2, 9, 3, 4, 2), jnp.float32)
    whole = run(repeat_first, x, 9, 1)
    np.testing.assert_allclose(run(repeat_first, x, first, chunk), whole, atol=1e-6)


def test_a_clip_that_repeats_its_first_frame_stays_still():
    frame = jax.random.normal(jax.random.key(1), (1, 1, 3, 4, 2), jnp.float32)
    y = run(True, jnp.repeat(frame, 5, axis=1), 1, 2)
    np.testing.assert_allclose(y, jnp.repeat(y[:, :1], 5, axis=1), atol=1e-6)
