"""Policies of recomputing: the same gradients, and what each of them keeps."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_splash
from kernels.attention import attention
from qvgen_jax.errors import UserError
from qvgen_jax.models.remat import POLICIES, recomputed

LAYERS, TOKENS, HEADS, DIM = 3, 640, 2, 64


def layers(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.standard_normal((LAYERS, HEADS * DIM, HEADS * DIM)) / 16, dtype)
        for name in ("qkv", "out")
    }


def loss(policy, attend, x, stack):
    def body(x, layer):
        q = (x @ layer["qkv"]).reshape(1, -1, HEADS, DIM)
        return x + attend(q, q, q).reshape(x.shape) @ layer["out"], None

    return jnp.sum(jax.lax.scan(recomputed(body, policy), x, stack)[0] ** 2)


def tokens(count=TOKENS):
    return jnp.asarray(np.random.default_rng(1).standard_normal((1, count, HEADS * DIM)), "float32")


@pytest.mark.parametrize("policy", [p for p in POLICIES if p != "none"])
def test_every_policy_has_the_gradients_of_keeping_everything(policy):
    gradients = [
        jax.jit(jax.grad(lambda x, s, p=p: loss(p, attention, x, s), (0, 1)))(tokens(), layers())
        for p in ("none", policy)
    ]
    for a, b in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(a).max())


def kept(policy, attend, count):
    """Elements a layer that the backward pass finds in memory, beside the layers' own."""
    run = partial(loss, policy, attend)
    backward = jax.eval_shape(lambda x, s: jax.vjp(run, x, s)[1], tokens(count), layers())
    own = [x.shape for x in layers().values()]
    found = [x for x in jax.tree.leaves(backward) if x.shape[:1] == (LAYERS,)]
    return sum(x.size for x in found if x.shape not in own) / LAYERS


def splash(query, key, value):
    return attention_splash.attention(query, key, value, interpret=True)


@pytest.mark.parametrize(
    ("policy", "arrays"),
    # The block's input; with it the attention's result and of each row the logarithm of its sum.
    [("blocks", 1), ("attention", 2 + 1 / DIM)],
)
def test_a_block_keeps_what_the_policy_names(policy, arrays):
    assert kept(policy, splash, TOKENS) == arrays * TOKENS * HEADS * DIM


def test_a_short_attention_is_repeated():
    assert kept("attention", splash, 512) == kept("blocks", splash, 512) == 512 * HEADS * DIM


def test_an_unknown_policy_names_those_there_are():
    with pytest.raises(UserError, match="remat is 'all'; expected one of none, blocks, attention"):
        recomputed(lambda x, block: (x, None), "all")
