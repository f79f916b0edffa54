"""Long attention in chunks is the same function as the short one, and stays small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_xla as module

TOKENS = 32760  # Of Wan-14B: 480 x 832 pixels, 81 frames.
SCORES = 4 * TOKENS**2  # Bytes of one head's logits: 4.3 GB.


def plain(query, key, value, bias=None, mask=None, scale=None):
    """All logits at once, float32."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") * scale
    logits = logits if bias is None else logits + bias
    logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), value, precision="highest")


def values(key, keys, dtype=jnp.float32):
    rng = np.random.default_rng(key)
    shapes = [(2, 300, 3, 8), *[(2, keys, 3, 8)] * 2, (2, 300, 3, 8)]
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.fixture
def three_chunks(monkeypatch):
    """Chunks of 100 of the 300 queries."""

    def cut(keys, heads):
        monkeypatch.setattr(module, "_OF_ONE_HEAD", 130 * keys)
        monkeypatch.setattr(module, "_OF_ALL_HEADS", 130 * keys * heads)

    return cut


@pytest.mark.parametrize("by_head", [True, False])
def test_chunks_of_queries_equal_the_whole_in_value_and_gradient(by_head, three_chunks):
    # 1e-5: both take their softmax in float32, in another order of summation.
    keys = 41
    query, key, value, out = values(0, keys)
    three_chunks(keys, heads=6)

    def loss(function, **options):
        return lambda *x: jnp.sum(out * function(*x, scale=0.3, **options))

    chunked = jax.value_and_grad(loss(module.attention, by_head=by_head), (0, 1, 2))
    text = jax.jit(chunked).lower(query, key, value).as_text()
    assert f"100x{keys}x" in text
    assert f"300x{keys}x" not in text
    whole = jax.value_and_grad(loss(plain), (0, 1, 2))(query, key, value)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        chunked(query, key, value),
        whole,
    )


@pytest.mark.parametrize("rows", [1, 300])
def test_bias_and_mask_are_cut_with_the_queries(rows, three_chunks):
    query, key, value, out = values(1, 41)
    rng = np.random.default_rng(2)
    bias = jnp.asarray(rng.standard_normal((1, 3, rows, 41)), jnp.float32)
    mask = jnp.asarray(rng.random((2, 1, rows, 41)) < 0.7).at[..., 0].set(True)
    three_chunks(41, heads=6)

    def loss(function):
        return lambda *x: jnp.sum(out * function(*x[:3], bias=x[3], mask=mask))

    # 1e-5: as above.
    every = (0, 1, 2, 3)
    chunked = jax.value_and_grad(loss(module.attention), every)(query, key, value, bias)
    whole = jax.value_and_grad(loss(plain), every)(query, key, value, bias)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), chunked, whole
    )


@pytest.mark.parametrize("by_head", [True, False])
def test_gradients_in_bfloat16_are_summed_over_chunks_in_float32(by_head, monkeypatch):
    # Ten chunks of like sign: a bfloat16 sum would lose 2^-9 at each step, up to 1 % at the end;
    # 2^-8 is what rounding each chunk's part and the result leaves.
    query, key, value, out = (jnp.abs(x) for x in values(3, 16, jnp.bfloat16))
    monkeypatch.setattr(module, "_FEWEST_QUERIES", 1)
    heads = 1 if by_head else 6
    monkeypatch.setattr(module, "_OF_ONE_HEAD" if by_head else "_OF_ALL_HEADS", 30 * 16 * heads)

    def loss(v):
        y = module.attention(query, key, v, by_head=by_head)
        return jnp.sum((out * y).astype(jnp.float32))

    wide = [x.astype(jnp.float32) for x in (query, key, value, out)]
    exact = jax.grad(lambda v: jnp.sum(wide[3] * plain(*wide[:2], v)))(wide[2])
    chunked = np.asarray(jax.grad(loss)(value), np.float32)
    error = np.abs(chunked - exact) / np.abs(exact)
    assert error.max() < 2**-7
    assert error.mean() < 2**-9


def test_a_row_that_sees_no_key_is_finite_in_chunks_too(three_chunks):
    query, key, value, _ = values(4, 40)
    three_chunks(40, heads=6)
    y = module.attention(query, key, value, mask=jnp.zeros((1, 1, 1, 40), bool))
    mean = jnp.broadcast_to(value.mean(1, keepdims=True), y.shape)
    np.testing.assert_allclose(y, mean, rtol=1e-5, atol=1e-5)


def compiled(function, heads, arguments):
    like = jax.ShapeDtypeStruct((1, TOKENS, heads, 128), jnp.bfloat16)
    return jax.jit(function).lower(*[like] * arguments).compile().memory_analysis()


def backward(query, key, value, out):
    return jax.vjp(module.attention, query, key, value)[1](out)


def test_the_forward_of_a_long_video_holds_no_score_matrix_on_a_cpu():
    # Forty heads: 64 MB of logits, the same of weights, and float32 copies of what goes in.
    inputs = 40 * TOKENS * 128 * 4
    held = compiled(module.attention, 40, 3).temp_size_in_bytes
    assert held < 0.5 * SCORES + 4 * inputs
    assert held < SCORES  # Of one head, of forty.


def test_the_backward_of_a_long_video_holds_no_score_matrix_on_a_cpu():
    assert compiled(backward, 1, 4).temp_size_in_bytes < 0.15 * SCORES
