"""Scaled dot-product attention: the one place that knows which implementation runs it.

The environment variable QVGEN_ATTENTION overrules the choice by device: a backend's name, which
then has to take every call, or several with commas between, of which the first that takes a call
runs it (`QVGEN_ATTENTION=tokamax,xla`).
"""

import os
from types import MappingProxyType
from typing import NamedTuple

import jax

from kernels import attention_cudnn, attention_splash, attention_tokamax, attention_xla
from kernels.attention_call import AttentionCall
from kernels.choose import say_once
from kernels.target import target

_BACKENDS = MappingProxyType(
    {
        "cudnn": attention_cudnn,
        "splash": attention_splash,
        "tokamax": attention_tokamax,
        "xla": attention_xla,
    }
)
_PREFERRED = MappingProxyType(
    {"cpu": ("xla",), "gpu": ("cudnn", "tokamax", "xla"), "tpu": ("splash", "xla")}
)
_VARIABLE = "QVGEN_ATTENTION"


class Choice(NamedTuple):
    """A backend's name, and why it is this one."""

    backend: str
    reason: str


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> jax.Array:
    """`softmax(scale * q k^T + bias) v` with a float32 softmax.

    Args:
        query: `[batch, tokens, heads, head_dim]`.
        key: `[batch, keys, heads, head_dim]`, as is `value`.
        bias: added to the logits, broadcasts to `[batch, heads, tokens, keys]`.
        mask: bool, True where a key may be seen, broadcasts like `bias`.
        scale: `head_dim ** -0.5` if None.
        backend: a name, or several with commas between in the order to try them. None is what
            QVGEN_ATTENTION says, else what suits `kernels.target`; where a backend refuses, the
            next one is taken, and the reason logged once.

    Returns:
        `[batch, tokens, heads, head_dim]` in the dtype of `query`.

    Raises:
        NotImplementedError: none of the backends that were asked for takes the call.
        ValueError: an unknown backend, or arrays that do not belong together.
    """
    order = _order(target().platform, backend)
    refusals = []
    for name in order:
        try:
            y = _BACKENDS[name].attention(query, key, value, bias=bias, mask=mask, scale=scale)
        except NotImplementedError as reason:
            refusals.append(f"{name}: {reason}")
        else:
            for refusal in refusals:
                say_once(f"attention falls back to {name}; {refusal}")
            return y
    raise NotImplementedError(_refused(refusals))


def choose_attention(device: str, call: AttentionCall, backend: str | None = None) -> Choice:
    """What `attention` would run on a device that need not be there.

    Args:
        device: "cpu", "gpu" or "tpu", or a `device_kind` such as "TPU v5 lite" or "NVIDIA H200".
        backend: as in `attention`.

    Returns:
        The choice. tokamax counts as installed if it is so here.

    Raises:
        NotImplementedError, ValueError: as in `attention`; or the device is unknown.
    """
    platform = _platform(device)
    refusals = []
    for name in _order(platform, backend):
        try:
            _BACKENDS[name].check(call)
        except NotImplementedError as reason:
            refusals.append(f"{name}: {reason}")
        else:
            return Choice(name, "; ".join(refusals) or f"first choice on {platform}")
    raise NotImplementedError(_refused(refusals))


def _order(platform: str, backend: str | None) -> tuple[str, ...]:
    """Names of backends to try."""
    source = "backend" if backend else _VARIABLE
    backend = backend or os.environ.get(_VARIABLE)
    if not backend:
        return _PREFERRED.get(platform, ("xla",))
    order = tuple(name.strip() for name in backend.split(","))
    for name in order:
        if name not in _BACKENDS:
            names = ", ".join(_BACKENDS)
            raise ValueError(f"{source}={backend!r}: {name!r} is none of {names}; name one of them")
    return order


def _platform(device: str) -> str:
    name = device.lower()
    if name.startswith(("nvidia", "tesla", "cuda")):
        return "gpu"
    known = [platform for platform in _PREFERRED if name.startswith(platform)]
    if not known:
        raise ValueError(
            f"device is {device!r}; expected cpu, gpu, tpu or a device_kind such as 'TPU v5 lite' "
            "or 'NVIDIA H200'"
        )
    return known[0]


def _refused(refusals: list[str]) -> str:
    asked = "; ".join(refusals)
    return f"no attention backend that was asked for takes the call ({asked}); add xla to the order"
