"""An NVIDIA H200 that is not there, for jax to compile for: needs its CUDA plugin, but no GPU."""

import jax
from jax.experimental import topologies

from kernels.chips import CHIPS
from qvgen_jax.plan.gpus import description


def h200() -> jax.Device:
    """A device that can be compiled for and run nothing."""
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name="h200",
        topology="1x1x1",
        target_config=description(CHIPS["h200"]),
    )
    return topology.devices[0]
