"""Attention by JAX's splash kernels for TPUs, padded to whole blocks of rows."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from kernels.attention_call import AttentionCall, call_of, kept_name, refuse_bias_and_mask
from kernels.partition import automatic_axes

_LANES = 128
# Rows of a block. All of them compile within the 16 MB of on-chip memory that a kernel may take.
_BLOCKS = range(512, 1024 + 1, _LANES)
_WIDEST = 128


def check(call: AttentionCall) -> None:
    """All lengths are taken, from one token on.

    Raises:
        NotImplementedError: neither bfloat16 nor float32, a bias or a mask, or a head wider than
            the blocks are sized for.
    """
    if call.dtype not in (jnp.bfloat16, jnp.float32):
        name = jnp.dtype(call.dtype).name
        raise NotImplementedError(f"it has no {name}; expected bfloat16 or float32")
    refuse_bias_and_mask(call)
    if call.head_dim > _WIDEST:
        raise NotImplementedError(f"head_dim is {call.head_dim}; expected at most {_WIDEST}")


def block_rows(length: int) -> int:
    """Rows of a block for this many rows: of 512 to 1024 what pads least, the largest of these."""
    if length <= _BLOCKS[0]:
        return -(-length // _LANES) * _LANES
    return min(_BLOCKS, key=lambda block: (-length % block, -block))


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    scale: float | None = None,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`kernels.attention.attention` in one kernel forward and two backward.

    The scale goes into the queries, rounded to their type: one rounding more, of the size of the
    one they come with (none where it is a power of two, as with 64 channels). Under
    `jax.set_mesh(mesh)` batch and heads go over the mesh, whole tokens to each device.

    Args:
        blocks: rows of a block of queries and of keys; None is `block_rows` of each length.
        interpret: run the kernels' definitions, on any device.

    Raises:
        NotImplementedError: see `check`; or there are several devices and no mesh in the context.
    """
    call = call_of(query, key, value, bias, mask)
    check(call)
    scale = call.head_dim**-0.5 if scale is None else scale
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    rows = blocks or (block_rows(call.tokens), block_rows(call.keys))
    run = partial(_one_device, rows=rows, interpret=interpret)
    axes = {} if interpret and jax.sharding.get_abstract_mesh().empty else automatic_axes()
    if axes:
        spec = _spec(axes, call)
        run = jax.shard_map(
            run,
            in_specs=(spec, spec, spec),
            out_specs=spec,
            axis_names=set(axes),
            check_vma=False,
        )
    return run(query, key, value)


def _one_device(
    query: jax.Array, key: jax.Array, value: jax.Array, *, rows: tuple[int, int], interpret: bool
) -> jax.Array:
    """`[batch, tokens, heads, head_dim]` of scaled queries, in blocks of so many rows."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask_info as masks,
    )

    def laid_out(x: jax.Array, block: int) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)))
        return x.transpose(0, 2, 1, 3)

    q, k, v = (laid_out(x, n) for x, n in ((query, rows[0]), (key, rows[1]), (value, rows[1])))
    ids = None
    if k.shape[2] != key.shape[1]:
        # Padded queries see real keys, so that no row is empty; nothing reads what they give.
        real = jax.lax.iota(jnp.int32, k.shape[2]) < key.shape[1]
        ids = kernels.SegmentIds(jnp.ones(q.shape[2], jnp.int32), real.astype(jnp.int32))
    # What the library's constructor makes of a full mask, it makes with a loop over all blocks.
    every = masks.MaskInfo(None, None, None, None, None)
    kernel = kernels.SplashAttentionKernel(
        every,
        every,
        every,
        block_sizes=kernels.BlockSizes(
            block_q=rows[0],
            block_kv=rows[1],
            block_q_dkv=rows[0],
            block_kv_dkv=rows[1],
            block_q_dq=rows[0],
            block_kv_dq=rows[1],
        ),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=kept_name(key.shape[1]),
        mask_function=None,
        interpret=interpret,
    )
    y = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(q, k, v)
    return y[:, :, : query.shape[1]].transpose(0, 2, 1, 3)


def _spec(axes: dict[str, int], call: AttentionCall) -> PartitionSpec:
    """Samples over the first axes that divide them, heads over the others that divide those.

    That is where a mesh of (data, model) has them; from elsewhere XLA brings them.
    """
    of_batch, of_heads, batch, heads = [], [], call.batch, call.heads
    for name, size in axes.items():
        if batch % size == 0:
            of_batch, batch = [*of_batch, name], batch // size
        elif heads % size == 0:
            of_heads, heads = [*of_heads, name], heads // size
    return PartitionSpec(tuple(of_batch), None, tuple(of_heads))
