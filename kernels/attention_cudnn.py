"""Attention by cuDNN's fused kernel, on NVIDIA GPUs from Ampere on."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from kernels.attention_call import AttentionCall, call_of, kept_name, refuse_bias_and_mask

# JAX's primitive that gives the result and what the backward pass needs of it; it names neither.
_FORWARD = "dot_product_attention_fwd_wrapper"
_WIDEST = 128  # Of Ampere and Ada; Hopper's goes to 256, which no model here has.


def check(call: AttentionCall) -> None:
    """All lengths are taken.

    Raises:
        NotImplementedError: not in 16 bits, a bias or a mask (text, which has them, is short), or
            a head_dim it has no kernel for.
    """
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        name = jnp.dtype(call.dtype).name
        raise NotImplementedError(f"it has no {name}; expected bfloat16 or float16")
    refuse_bias_and_mask(call)
    if call.head_dim % 8 or call.head_dim > _WIDEST:
        raise NotImplementedError(
            f"head_dim is {call.head_dim}; expected a multiple of 8, at most {_WIDEST}"
        )


def is_kept(primitive: Primitive, *operands: jax.Array, **_: Any) -> bool:
    """As a policy of `jax.checkpoint`: whether it is cuDNN's attention to more than a prompt."""
    return primitive.name == _FORWARD and kept_name(operands[1].shape[1]) is not None


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
) -> jax.Array:
    """`kernels.attention.attention` in one kernel forward and one backward.

    It never writes the tokens x keys logits: 50 GB a layer at 480p without it. Batch and heads may
    be sharded.

    Raises:
        NotImplementedError: see `check`; or there is no cuDNN.
    """
    call = call_of(query, key, value, bias, mask)
    check(call)

    def even(x: jax.Array) -> jax.Array:
        # JAX refuses gradients of odd lengths, and only once it takes them: too late to fall back.
        return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))

    # What masks the padding of the keys; without any, cuDNN's plain kernel runs.
    lengths = jnp.full(call.batch, call.keys, jnp.int32) if call.keys % 2 else None
    try:
        y = jax.nn.dot_product_attention(
            *(even(x) for x in (query, key, value)),
            scale=scale,
            key_value_seq_lengths=lengths,
            implementation="cudnn",
        )
    except RuntimeError as error:  # JAX's word for a missing library.
        raise NotImplementedError(str(error)) from error
    return y[:, : call.tokens]
