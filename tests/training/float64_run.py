"""A small training run whose arrays are all float64: over any devices to 1e-9 the same."""

import contextlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax import sharding
from qvgen_jax.models import abstract_params
from qvgen_jax.training import loop
from tests.training.test_run import SCHEDULER, Clips


class Clips64(Clips):
    """In float64, as their noise then is too."""

    def __getitem__(self, index: int) -> dict:
        clip = super().__getitem__(index)
        return {
            name: part.astype(np.float64) if isinstance(part, np.ndarray) else part
            for name, part in clip.items()
        }


@contextlib.contextmanager
def masters_in_float64():
    """What a run creates its state from, of which clips come in float32."""
    create = loop.create_state
    loop.create_state = lambda params, *others, **options: create(
        jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params), *others, **options
    )
    try:
        yield
    finally:
        loop.create_state = create


def train64(config: dict, model, workdir: Path, mesh) -> dict:
    """The last state of a small run, all of it in float64."""
    quant = {**config["quant"], "product_dtype": "float64"}
    config = {**config, "compute_dtype": "float64", "quant": quant}
    rng = np.random.default_rng(0)
    like = abstract_params(model)
    teacher = jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape)), like)
    teacher = sharding.place(teacher, mesh)
    with masters_in_float64():
        return loop.run_steps(config, workdir, model, SCHEDULER, teacher, Clips64(), mesh)[0]
