"""One call, several backends: the same function, chosen by device, never silently another."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import attention_cudnn, attention_splash, attention_tokamax, attention_xla, choose
from kernels.attention import attention, choose_attention
from kernels.attention_call import AttentionCall

WAN_14B = AttentionCall(1, 32760, 32760, 40, 128, jnp.bfloat16)
TEXT = AttentionCall(1, 512, 512, 64, 64, jnp.bfloat16, bias=True, mask=True)


def definition(query, key, value, bias=0.0, mask=True, scale=None):
    """The softmax on paper, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = np.einsum("bthd,bshd->bhts", q, k) * scale + np.asarray(bias, np.float64)
    logits = np.where(mask, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", weights / weights.sum(-1, keepdims=True), v)


def arrays(tokens, keys, *, batch=2, heads=3, dim=8, dtype=jnp.float32):
    rng = np.random.default_rng(tokens + keys)
    sizes = (tokens, keys, keys)
    return [
        jnp.asarray(rng.standard_normal((batch, n, heads, dim)), jnp.float32).astype(dtype)
        for n in sizes
    ]


@pytest.mark.parametrize(("tokens", "keys"), [(37, 37), (1, 1), (1, 9), (33, 5)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_it_is_the_softmax_on_paper(tokens, keys, scale):
    # 1e-5: float32 against float64.
    q, k, v = arrays(tokens, keys)
    np.testing.assert_allclose(
        attention(q, k, v, scale=scale), definition(q, k, v, scale=scale), rtol=1e-5, atol=1e-5
    )


def test_bias_and_mask_are_those_on_paper():
    q, k, v = arrays(7, 7)
    rng = np.random.default_rng(0)
    bias = jnp.asarray(rng.standard_normal((1, 3, 7, 7)), jnp.float32)
    mask = jnp.arange(7)[None, None, None] < jnp.asarray([7, 4])[:, None, None, None]
    y = attention(q, k, v, bias=bias, mask=mask, scale=1.0)
    np.testing.assert_allclose(y, definition(q, k, v, bias, mask, 1.0), rtol=1e-5, atol=1e-5)


def test_the_result_has_the_type_of_the_query():
    # 2e-2: bfloat16 keeps 8 bits of the values, of size 1, and of the weights.
    q, k, v = arrays(37, 37, dtype=jnp.bfloat16)
    y = attention(q, k, v)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), definition(q, k, v), atol=2e-2)


@pytest.mark.parametrize(
    ("device", "call", "backend", "reason"),
    [
        ("cpu", WAN_14B, "xla", "first choice on cpu"),
        ("NVIDIA H200", WAN_14B, "cudnn", "first choice on gpu"),
        ("TPU v5 lite", WAN_14B, "splash", "first choice on tpu"),
        ("TPU v6 lite", WAN_14B._replace(dtype=jnp.float16), "xla", "splash: it has no float16"),
        ("TPU v5 lite", TEXT, "xla", "splash: it is not given a bias"),
        ("tpu", WAN_14B._replace(head_dim=192), "xla", "head_dim is 192; expected at most 128"),
    ],
)
def test_the_choice_needs_no_device(device, call, backend, reason):
    choice = choose_attention(device, call)
    assert choice.backend == backend
    assert reason in choice.reason


def test_a_gpu_without_tokamax_gives_what_cudnn_refuses_to_xla(monkeypatch):
    monkeypatch.setattr(attention_tokamax.importlib.util, "find_spec", lambda name: None)
    for call, reason in (
        (TEXT, "cudnn: it is not given a bias"),
        (WAN_14B._replace(dtype=jnp.float32), "cudnn: it has no float32"),
        (WAN_14B._replace(head_dim=100), "cudnn: head_dim is 100; expected a multiple of 8"),
        (WAN_14B._replace(mask=True), "cudnn: it is not given a mask"),
    ):
        choice = choose_attention("gpu", call)
        assert choice.backend == "xla"
        assert reason in choice.reason
        assert "tokamax is not installed" in choice.reason


def test_odd_lengths_are_no_reason_to_refuse():
    odd = WAN_14B._replace(tokens=17777, keys=17777)
    assert choose_attention("gpu", odd).backend == "cudnn"
    assert choose_attention("tpu", odd).backend == "splash"


def test_the_variable_overrules_the_device_and_the_argument_the_variable(monkeypatch):
    monkeypatch.setenv("QVGEN_ATTENTION", "splash, xla")
    assert choose_attention("cpu", WAN_14B).backend == "splash"
    assert choose_attention("cpu", TEXT).backend == "xla"
    assert choose_attention("cpu", WAN_14B, "cudnn").backend == "cudnn"


def test_what_was_asked_for_alone_does_not_fall_back(monkeypatch):
    q, k, v = arrays(5, 5)
    reason = r"takes the call \(cudnn: it has no float32; expected bfloat16.*add xla to the order"
    with pytest.raises(NotImplementedError, match=reason):
        attention(q, k, v, backend="cudnn")
    monkeypatch.setenv("QVGEN_ATTENTION", "cudnn")
    with pytest.raises(NotImplementedError, match=reason):
        attention(q, k, v)
    with pytest.raises(NotImplementedError, match=reason):
        choose_attention("gpu", WAN_14B._replace(dtype=jnp.float32))


def test_unknown_names_are_refused(monkeypatch):
    q, k, v = arrays(5, 5)
    names = "none of cudnn, splash, tokamax, xla"
    with pytest.raises(ValueError, match=f"backend='flash': 'flash' is {names}"):
        attention(q, k, v, backend="flash")
    monkeypatch.setenv("QVGEN_ATTENTION", "xla,flash")
    with pytest.raises(ValueError, match=f"QVGEN_ATTENTION='xla,flash': 'flash' is {names}"):
        attention(q, k, v)
    with pytest.raises(ValueError, match="device is 'abacus'; expected cpu, gpu, tpu"):
        choose_attention("abacus", WAN_14B, "xla")


def test_a_fallback_is_logged_once_for_each_reason(caplog):
    choose._said.clear()
    q, k, v = arrays(5, 5)
    bias = jnp.zeros((1, 1, 5, 5))
    with caplog.at_level(logging.WARNING, logger="kernels"):
        for _ in range(3):
            y = attention(q, k, v, backend="cudnn,xla")
        assert len(caplog.records) == 1
        assert "falls back to xla; cudnn: it has no float32" in caplog.text
        for _ in range(2):
            attention(q, k, v, bias=bias, backend="splash,xla")
        assert len(caplog.records) == 2
        assert "falls back to xla; splash: it is not given a bias" in caplog.text
    np.testing.assert_array_equal(y, attention(q, k, v))


def test_no_fallback_no_log(caplog):
    choose._said.clear()
    with caplog.at_level(logging.DEBUG, logger="kernels"):
        attention(*arrays(5, 5))
    assert not caplog.records


def test_every_backend_refuses_in_its_own_file():
    q, k, v = arrays(5, 5, dtype=jnp.bfloat16)
    for backend in (attention_cudnn, attention_splash):
        with pytest.raises(NotImplementedError, match="it is not given a bias"):
            backend.attention(q, k, v, bias=jnp.zeros((1, 1, 5, 5)))


def test_cudnn_without_cudnn_says_so():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    q, k, v = arrays(5, 5, dtype=jnp.bfloat16)
    with pytest.raises(
        NotImplementedError, match=r"cuDNN is not detected|not found for platform cpu"
    ):
        attention_cudnn.attention(q, k, v)


def test_arrays_that_do_not_belong_together_are_refused():
    q, k, v = arrays(5, 5)
    with pytest.raises(ValueError, match="expected the same batch, heads and head_dim"):
        attention(q, k[:, :, :1], v[:, :, :1])
    with pytest.raises(ValueError, match="expected one type"):
        attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match=r"expected \[batch, tokens, heads, head_dim\]"):
        attention(q[0], k, v)
    with pytest.raises(ValueError, match=r"bias \(1, 1, 5, 4\) does not broadcast"):
        attention(q, k, v, bias=jnp.zeros((1, 1, 5, 4)))
    with pytest.raises(ValueError, match="by_head=True with a bias or a mask"):
        attention_xla.attention(q, k, v, bias=jnp.zeros((1, 1, 5, 5)), by_head=True)


def test_tokamax_is_the_same_function():
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    # 1e-5: its implementation for any device, in float32, sums in another order.
    q, k, v = arrays(37, 21, dim=16)
    bias = jnp.asarray(np.random.default_rng(1).standard_normal((1, 3, 37, 21)), jnp.float32)
    y = attention_tokamax.attention(q, k, v, bias=bias, scale=0.3, implementation=("xla_chunked",))
    np.testing.assert_allclose(y, definition(q, k, v, bias, scale=0.3), rtol=1e-5, atol=1e-5)


def test_tokamax_where_none_of_its_kernels_run_says_why():
    pytest.importorskip("tokamax", reason="tokamax is not installed")
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    q, k, v = arrays(32, 32, dim=16, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="tokamax: "):
        attention_tokamax.attention(q, k, v)
