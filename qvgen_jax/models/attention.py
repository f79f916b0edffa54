"""Attention of the models: on one device, or over a mesh with tokens and heads apart."""

import math
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

    Under `jax.set_mesh` of a run's mesh the queries' tokens lie over several devices, see
    `sharding.layout`. In self-attention those exchange tokens for heads and back (all-to-all) where
    they divide a device's heads, and gather all keys and values where not; see `exchange`.

    Args:
        tokens: in self-attention, how many tokens are real; those behind pad, and are not seen.
            None is attention to other keys, which every device of a sample has whole.
    """
    axes = sharding.axes_in_context()
    if not axes:
        return on_one_device(query, key, value)
    samples, over = sharding.layout(len(query), axes)
    over = tuple(axis for axis in over if axes[axis] > 1)
    over_tokens = P(samples, over, "tensor")
    keys = over_tokens if tokens else P(samples, None, "tensor")
    way = exchange(query.shape[2], math.prod(axes[axis] for axis in over), axes["tensor"])
    return jax.shard_map(
        partial(_WAYS[way if tokens else "none"], tokens=tokens, axes=over),
        in_specs=(over_tokens, keys, keys),
        out_specs=over_tokens,
        check_vma=False,
    )(query, key, value)


def exchange(heads: int, devices: int, tensor: int = 1) -> str:
    """How self-attention goes over the devices that share a sample's tokens.

    Args:
        heads: of the model.
        devices: that share the tokens.
        tensor: size of the mesh's axis that cuts heads apart already.

    Returns:
        "none", by "heads" or by "keys".
    """
    if devices == 1:
        return "none"
    return "keys" if heads // tensor % devices else "heads"


def _alone(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: int | None, axes: tuple[str, ...]
) -> jax.Array:
    del axes
    return on_one_device(q, k[:, :tokens], v[:, :tokens])


def _by_heads(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, axes: tuple[str, ...]
) -> jax.Array:
    give = partial(jax.lax.all_to_all, axis_name=axes, tiled=True)
    q, k, v = (give(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    y = on_one_device(q[:, :tokens], k[:, :tokens], v[:, :tokens])
    y = jnp.pad(y, ((0, 0), (0, q.shape[1] - tokens), (0, 0), (0, 0)))
    return give(y, split_axis=1, concat_axis=2)


def _by_keys(
    q: jax.Array, k: jax.Array, v: jax.Array, tokens: int, axes: tuple[str, ...]
) -> jax.Array:
    k, v = (jax.lax.all_gather(x, axes, axis=1, tiled=True) for x in (k, v))
    return on_one_device(q, k[:, :tokens], v[:, :tokens])


_WAYS = {"none": _alone, "heads": _by_heads, "keys": _by_keys}
