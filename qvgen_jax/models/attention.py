"""Attention of the models: on one device, or over a mesh with tokens and heads apart."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels.attention import attention as on_one_device
from qvgen_jax import sharding


def attention(
    query: jax.Array, key: jax.Array, value: jax.Array, *, tokens: int | None = None
) -> jax.Array:
    """`softmax(q k^T / sqrt(head_dim)) v`, each array `[batch, tokens, heads, head_dim]`.

    Under `jax.set_mesh` of a run's mesh the queries' tokens lie over `context`. In self-attention
    devices exchange tokens for heads and back (all-to-all) where `context` divides a device's
    heads, and gather all keys and values where it does not; see `exchange`.

    Args:
        tokens: in self-attention, how many tokens are real; those behind pad, and are not seen.
            None is attention to other keys, which every device of a sample has whole.
    """
    axes = sharding.axes_in_context()
    if not axes:
        return on_one_device(query, key, value)
    over_tokens = P(sharding.SAMPLES, "context", "tensor")
    keys = over_tokens if tokens else P(sharding.SAMPLES, None, "tensor")
    way = exchange(query.shape[2], axes) if tokens else "none"
    return jax.shard_map(
        partial(_WAYS[way], tokens=tokens),
        in_specs=(over_tokens, keys, keys),
        out_specs=over_tokens,
        check_vma=False,
    )(query, key, value)


def exchange(heads: int, axes: dict[str, int]) -> str:
    """How self-attention goes over `context`: "none", by "heads" or by "keys".

    Args:
        heads: of the model.
        axes: sizes of the mesh.
    """
    if axes["context"] == 1:
        return "none"
    return "keys" if heads // axes["tensor"] % axes["context"] else "heads"


def _alone(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int | None) -> jax.Array:
    return on_one_device(q, k[:, :tokens], v[:, :tokens])


def _by_heads(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    give = partial(jax.lax.all_to_all, axis_name="context", tiled=True)
    q, k, v = (give(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    y = on_one_device(q[:, :tokens], k[:, :tokens], v[:, :tokens])
    y = jnp.pad(y, ((0, 0), (0, q.shape[1] - tokens), (0, 0), (0, 0)))
    return give(y, split_axis=1, concat_axis=2)


def _by_keys(q: jax.Array, k: jax.Array, v: jax.Array, tokens: int) -> jax.Array:
    k, v = (jax.lax.all_gather(x, "context", axis=1, tiled=True) for x in (k, v))
    return on_one_device(q, k[:, :tokens], v[:, :tokens])


_WAYS = {"none": _alone, "heads": _by_heads, "keys": _by_keys}
