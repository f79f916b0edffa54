"""Splash attention, interpreted: padded to blocks, masked by segments, the same function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.attention_splash import attention, block_rows

SMALL = (128, 128)  # Blocks: the lengths below take up to three.


def plain(query, key, value, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = jnp.einsum("bthd,bshd->bhts", query, key, precision="highest") * scale
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), value, precision="highest")


def values(tokens, keys, dim, dtype=jnp.float32):
    rng = np.random.default_rng(tokens + keys)
    shapes = [(2, n, 2, dim) for n in (tokens, keys, keys, tokens)]
    return [jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype) for shape in shapes]


@pytest.mark.parametrize(
    ("tokens", "keys", "dim"),
    [(257, 257, 64), (130, 128, 128), (1, 129, 64)],
    ids=["odd", "keys that fill their blocks", "one token"],
)
def test_value_and_gradients_equal_the_softmax(tokens, keys, dim):
    # 1e-5: float32, summed block by block.
    *inputs, out = values(tokens, keys, dim)
    y, pull = jax.vjp(lambda *x: attention(*x, blocks=SMALL, interpret=True), *inputs)
    expected, pull_expected = jax.vjp(plain, *inputs)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for grad, like in zip(pull(out), pull_expected(out), strict=True):
        np.testing.assert_allclose(grad, like, rtol=1e-5, atol=1e-5)


def test_padding_is_masked_even_where_its_logits_would_win():
    # Every real logit is -100, that of a padded key would be 0 and take all the weight.
    ones = jnp.ones((1, 130, 1, 64))
    value = values(130, 130, 64)[1][:1, :, :1]
    y = attention(10 * ones, -ones, value, blocks=SMALL, interpret=True, scale=100 / 640)
    # 1e-5: equal weights, so the mean.
    mean = jnp.broadcast_to(value.mean(1, keepdims=True), y.shape)
    np.testing.assert_allclose(y, mean, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_near_as_its_rounding():
    # 2e-2: 8 bits of values of size 1, and of the scaled queries.
    *inputs, _ = values(200, 140, 128, jnp.bfloat16)
    y = attention(*inputs, scale=0.1, blocks=SMALL, interpret=True)
    assert y.dtype == jnp.bfloat16
    expected = plain(*(x.astype(jnp.float32) for x in inputs), scale=0.1)
    np.testing.assert_allclose(y.astype(jnp.float32), expected, atol=2e-2)


@pytest.mark.parametrize(
    ("rows", "block", "padding"),
    [(32760, 1024, 8), (75600, 1024, 176), (17776, 896, 144), (512, 512, 0), (77, 128, 51)],
    ids=["Wan 480p", "Wan 720p", "CogVideoX", "text", "short"],
)
def test_blocks_are_large_and_pad_little(rows, block, padding):
    assert block_rows(rows) == block
    assert -rows % block == padding


def test_what_it_cannot_take_is_refused():
    *inputs, _ = values(5, 5, 8)
    with pytest.raises(NotImplementedError, match="it is not given a mask"):
        attention(*inputs, mask=jnp.ones((1, 1, 1, 5), bool), interpret=True)
    with pytest.raises(NotImplementedError, match="it has no float16"):
        attention(*(x.astype(jnp.float16) for x in inputs), interpret=True)
    with pytest.raises(NotImplementedError, match="head_dim is 136; expected at most 128"):
        attention(*values(5, 5, 136)[:3], interpret=True)


def test_several_devices_without_a_mesh_are_refused(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    with pytest.raises(NotImplementedError, match=r"8 devices and no mesh.*jax.set_mesh\(mesh\)"):
        attention(*values(5, 5, 8)[:3])


def test_a_mesh_in_the_context_maps_it_over_its_axes():
    # One device: what is mapped is the same; tests/aot compiles it for four.
    *inputs, _ = values(130, 20, 64)
    mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    run = jax.jit(lambda *x: attention(*x, blocks=SMALL, interpret=True))
    with jax.set_mesh(mesh):
        assert "shard_map" in str(jax.make_jaxpr(run)(*inputs))
        y = run(*inputs)
    np.testing.assert_allclose(y, plain(*inputs), rtol=1e-5, atol=1e-5)  # As above.
