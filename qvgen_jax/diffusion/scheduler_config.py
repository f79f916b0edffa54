"""What every sampler checks: the fields of a `scheduler_config.json`, and the number of steps."""

from collections.abc import Collection, Mapping
from typing import Annotated, Any

import numpy as np

from qvgen_jax.config_fields import Range
from qvgen_jax.errors import UserError

FILE = "scheduler_config.json"

Levels = Annotated[int, Range(least=2, below=1_000_000)]
"""Noise levels of a process: on a single one there is no path from noise to latents."""
Shift = Annotated[float, Range(above=0, below=1000)]
"""Of a flow's noise levels. Far beyond, all of them are the same number to float32."""


def check_options(
    fields: Mapping[str, Any],
    supported: Mapping[str, tuple],
    required: Collection[str],
    remedy: str,
) -> None:
    """Refuses a scheduler whose options would give other numbers than ours.

    Args:
        fields: the contents of `scheduler_config.json`.
        supported: by field, the values that are implemented.
        required: fields whose absence means diffusers' default, which is not supported.
        remedy: how the message ends.

    Raises:
        UserError: the first field, in the order of `supported`, with another value.
    """
    for field, values in supported.items():
        if field not in fields and field not in required:
            continue
        if fields.get(field) not in values:
            raise UserError(
                f"{FILE}: {field} is {fields.get(field)!r}, supported: "
                f"{', '.join(map(repr, values))}; {remedy}"
            )


def check_steps(steps: Any, most: int | None = None) -> None:
    """Raises UserError if `steps` is no whole number from 1 to `most`."""
    whole = isinstance(steps, int | np.integer) and not isinstance(steps, bool)
    if not whole or steps < 1 or (most is not None and steps > most):
        limit = "of at least 1" if most is None else f"from 1 to {most}"
        raise UserError(f"steps is {steps!r}, expected a whole number {limit}, such as 50")
