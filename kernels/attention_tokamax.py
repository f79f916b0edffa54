"""Attention by tokamax's kernels for GPUs (Pallas: Mosaic and Triton), where it is installed."""

import importlib.util

import jax
import jax.numpy as jnp

from kernels.attention_call import AttentionCall, call_of

# Not its "xla": that one holds the whole score matrix, and attention_xla does not.
_FUSED = ("mosaic", "triton")


def check(call: AttentionCall) -> None:
    """Takes biases and masks.

    Raises:
        NotImplementedError: tokamax is not installed, or the type is none of its kernels'.
    """
    if importlib.util.find_spec("tokamax") is None:
        raise NotImplementedError("tokamax is not installed (pip install tokamax, Python >= 3.12)")
    if call.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        name = jnp.dtype(call.dtype).name
        raise NotImplementedError(f"it has no {name}; expected bfloat16, float16 or float32")


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    implementation: tuple[str, ...] = _FUSED,
) -> jax.Array:
    """`kernels.attention.attention` by the first of tokamax's implementations that takes it.

    Raises:
        NotImplementedError: see `check`; or with the reasons of them all.
    """
    check(call_of(query, key, value, bias, mask))
    import tokamax

    try:
        y = tokamax.dot_product_attention(
            query, key, value, bias, mask, scale=scale, implementation=implementation
        )
    except ExceptionGroup as group:
        reasons = "; ".join(str(error) for error in group.exceptions)
        raise NotImplementedError(f"tokamax: {reasons}") from group
    return y.astype(query.dtype)
