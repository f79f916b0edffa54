"""The linears that see only the timestep, folded into a table of what they say (docs/format.md)."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from convert.names import Entry
from qvgen_jax.diffusion.schedulers import Scheduler, make_schedule
from qvgen_jax.models import TransformerConfig, time_only, time_outputs, time_values
from qvgen_jax.quant.named import with_layer, without_layer

TIMESTEPS = Entry(("timestep_table",), "timesteps")
"""The timesteps of the entries, float32 `[entries]`, sorted."""


def visited_timesteps(scheduler: Scheduler, step_counts: Iterable[int]) -> np.ndarray:
    """Every timestep that trajectories of these lengths call the network at.

    Returns:
        float32 `[entries]`, sorted, each once.

    Raises:
        UserError: the sampler cannot do that many steps.
    """
    visited = [make_schedule(scheduler, steps).timesteps for steps in step_counts]
    return np.unique(np.concatenate(visited))


def fold_time(model: TransformerConfig, params: Mapping, timesteps: np.ndarray) -> dict:
    """The params with tables in the place of the linears that see only the timestep.

    Args:
        model: the transformer's sizes.
        params: of a student whose `time_only` linears are in full precision; left as they are.
        timesteps: float32 `[entries]`, sorted.

    Returns:
        Params whose time outputs hold `table`, float32 `[entries, out]` (stacked for the blocks),
        and nothing else; `timestep_table` beside them.
    """
    # Otherwise an accelerator would multiply in fewer bits than the table holds.
    with jax.default_matmul_precision("highest"):
        values = time_values(model, params, timesteps)
    folded = {**params, "timestep_table": timesteps}
    for name in time_only(model):
        folded = without_layer(folded, name)
        if name in values:
            folded = with_layer(folded, name, {"table": np.asarray(values[name], np.float32)})
    return folded


def fold_names(table: list[Entry], model: TransformerConfig) -> list[Entry]:
    """The name table of folded params, from that of the full-precision model."""
    folded, inner, outputs = [TIMESTEPS], time_only(model), time_outputs(model)
    for entry in table:
        name = ".".join(entry.path[:-1])
        if name not in inner:
            folded.append(entry)
        elif name in outputs and entry.path[-1] == "kernel":
            stem = entry.name.removesuffix(".weight")
            path = (*entry.path[:-1], "table")
            folded.append(Entry(path, f"{stem}.table", "same", entry.layers))
    return folded
