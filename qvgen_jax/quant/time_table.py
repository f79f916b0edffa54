"""What the timestep's own linears say, looked up instead of computed (DSAQuant, arXiv 2609.04031).

A sampler calls the network at a few dozen timesteps, always the same ones. A linear that sees
nothing but the timestep then has a few dozen answers: they take less room than its weights, and
nothing of it has to be quantized.
"""

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.errors import UserError
from qvgen_jax.quant.dense import QuantContext

# Samplers compute their timesteps in numpy: another version of it may round the last bit otherwise.
_SAME = 1e-3


def stored_table(values: np.ndarray) -> np.ndarray:
    """The values as a file holds them: float16, or float32 where one is too large for float16.

    float16 is rounded to 2^-11 of a value (to 2^-25 below 6e-5), bfloat16 of the same size to 2^-8.
    """
    values = np.asarray(values, np.float32)
    fits = np.all(np.abs(values) <= np.finfo(np.float16).max)
    return values.astype(np.float16) if fits else values


def nearest_entry(timesteps: jax.Array, table: jax.Array) -> jax.Array:
    """Which entry of `table [entries]` is nearest to each of `timesteps [batch]`; int32 `[batch]`.

    Of two that are equally near, the first.
    """
    distance = jnp.abs(timesteps.astype(jnp.float32)[:, None] - table)
    return jnp.argmin(distance, axis=1).astype(jnp.int32)


def check_timesteps(timesteps: np.ndarray, table: np.ndarray, steps: Collection[int]) -> None:
    """Refuses a schedule that asks for what a table does not hold.

    Args:
        timesteps: `[steps]`, what the schedule visits.
        table: `[entries]`, sorted.
        steps: the step counts that the table was made for, for the message.

    Raises:
        UserError: some timestep is not in the table; the message names the step counts that are.
    """
    timesteps, table = np.asarray(timesteps, np.float64), np.asarray(table, np.float64)
    missing = timesteps[np.abs(timesteps[:, None] - table).min(axis=1) > _SAME]
    if not len(missing):
        return
    count, counts = len(timesteps), ", ".join(map(str, steps))
    remedy = f'use one of them, or export again with "--config.quant.table_steps=({count},)"'
    if count in steps:  # Then it is the noise levels that differ.
        remedy = "leave flow_shift away: the table is for the export's own scheduler_config.json"
    raise UserError(
        f"steps is {count}: {len(missing)} of the schedule's timesteps (such as {missing[0]:g}) "
        f"are not in the export's time table, which was made for steps = {counts or 'unknown'} "
        f"({len(table)} timesteps, {table[-1]:g} to {table[0]:g}); {remedy}"
    )


class TableDense(nnx.Module):
    """In the place of a linear that sees only the timestep: a row of `table [entries, out]`."""

    def __init__(self, entries: int, out_features: int, dtype: jnp.dtype = jnp.float32):
        self.table = nnx.Param(jnp.zeros((entries, out_features), jnp.float16))
        self.dtype = dtype

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """`[batch, out]` at `ctx.time_index`; `x` is not read."""
        return self.table[...][ctx.time_index].astype(self.dtype)


class UnreadDense(nnx.Module):
    """In the place of a linear whose output only tables would read: no parameters.

    It says NaN: should something read it after all, that is seen.
    """

    def __init__(self, out_features: int, dtype: jnp.dtype = jnp.float32):
        self.out_features = out_features
        self.dtype = dtype

    def __call__(self, x: jax.Array, ctx: QuantContext) -> jax.Array:
        """NaN `[batch, out]`."""
        return jnp.full((*x.shape[:-1], self.out_features), jnp.nan, self.dtype)


def table_factory(
    dense: Callable[..., nnx.Module],
    entries: int,
    time_only: Collection[str],
    time_outputs: Collection[str],
) -> Callable[..., nnx.Module]:
    """`dense`, but for the linears that see only the timestep.

    Args:
        dense: a factory with the signature of `Dense`.
        entries: of the tables.
        time_only: names of those linears.
        time_outputs: which of them others read; each becomes a `TableDense`.
    """

    def build(name: str, in_features: int, out_features: int, **arguments) -> nnx.Module:
        if name not in time_only:
            return dense(name, in_features, out_features, **arguments)
        dtype = arguments["dtype"]
        if name in time_outputs:  # The bias is in the table.
            return TableDense(entries, out_features, dtype)
        return UnreadDense(out_features, dtype)

    return build
