"""The batches of a run on the devices that need them."""

from collections.abc import Iterator, Mapping
from typing import Any

from jax.sharding import Mesh

from qvgen_jax import sharding
from qvgen_jax.data.dataset import Dataset, batches
from qvgen_jax.training.step import order_seed


def feed(
    dataset: Dataset,
    config: Mapping,
    start: int = 0,
    mesh: Mesh | None = None,
    order: int = 0,
) -> Iterator[dict[str, Any]]:
    """`batches` of the run from step `start` on; over a mesh, each device has its samples.

    Every process reads the samples of its own devices and no others. `order` is the state's.
    """
    size = config["train"]["batch_size"]
    order = {"seed": order_seed(config["seed"], order), "batch_size": size, "start_step": start}
    if mesh is None:
        return batches(dataset, **order)
    rows = sharding.rows_here(mesh, size)
    here = batches(dataset, rows=rows, **order)
    return ({key: sharding.from_rows(x, rows, size, mesh) for key, x in b.items()} for b in here)
