"""A transformer as stages that follow each other: what is before the blocks, each block, the rest.

Its parameters stay in the host's memory; a stage's own are on the devices while it runs. All blocks
are the same network of one layer: it is compiled once.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from qvgen_jax import sharding
from qvgen_jax.models import TransformerConfig, after_blocks, build_transformer, quantizable
from qvgen_jax.quant.blocks import is_stacked
from qvgen_jax.quant.dense import Dense


class Stage(NamedTuple):
    """One of them.

    Attributes:
        kind: `embed`, `block` or `head`.
        index: of the block; 0 for the others.
    """

    kind: str
    index: int = 0

    @property
    def block(self) -> int | None:
        """The block, if it is one."""
        return self.index if self.kind == "block" else None

    def __str__(self) -> str:
        return self.kind if self.block is None else f"block {self.block}"


def stages_of(model: TransformerConfig) -> list[Stage]:
    """All of them, in their order."""
    blocks = [Stage("block", index) for index in range(model.num_layers)]
    return [Stage("embed"), *blocks, Stage("head")]


def linears_of(kind: str, model: TransformerConfig) -> tuple[str, ...]:
    """The quantizable linears of a kind of stage."""

    def place(name: str) -> str:
        if is_stacked(name):
            return "block"
        return "head" if name in after_blocks(model) else "embed"

    return tuple(name for name in quantizable(model) if place(name) == kind)


def one_layer(model: TransformerConfig) -> TransformerConfig:
    """The same transformer with one block."""
    return dataclasses.replace(model, num_layers=1)


def part_of(params: Mapping, stage: Stage) -> dict:
    """The parameters that a stage reads, views of the whole: `[1, ...]` of a block's."""
    if stage.kind != "block":
        return {key: node for key, node in params.items() if key != "blocks"}
    cut = slice(stage.index, stage.index + 1)
    return {"blocks": jax.tree.map(lambda leaf: leaf[cut], params["blocks"])}


@dataclass(frozen=True, eq=False)
class Network:
    """A transformer of one block, described.

    Attributes:
        graphdef: from `nnx.split`.
        shapes: of its parameters, nested dict.
        fixed: what `nnx.merge` needs beside them: levels of a packed one.
        rest: the shapes of what `run` is given beside them: probes.
    """

    graphdef: nnx.GraphDef
    shapes: dict
    fixed: tuple[dict, ...] = ()
    rest: tuple[dict, ...] = ()

    def run(self, kind: str, params: Mapping, args: tuple, *more: dict) -> Any:
        """A stage; while JAX traces.

        Args:
            kind: of the stage.
            params: those that it reads.
            args: latents, timesteps and text for `embed`, tokens and conditions for the others.
            more: the values of `rest`.

        Returns:
            Tokens and conditions of `embed`, tokens of `block`, the prediction of `head`.
        """
        states = (_filled(self.shapes, params), *self.fixed, *more)
        network = nnx.merge(self.graphdef, *states)
        call = {"embed": network.embed, "block": network.run_blocks, "head": network.head}[kind]
        return call(*args)


def _filled(shapes: Mapping, params: Mapping) -> dict:
    """All parameters of a network; those that its stage does not read are nothing but described."""
    filled = {}
    for key, node in shapes.items():
        if isinstance(node, Mapping):
            filled[key] = _filled(node, params.get(key, {}))
        else:
            filled[key] = params[key] if key in params else jnp.zeros(node.shape, node.dtype)
    return filled


def plain_network(
    model: TransformerConfig, dtype: jnp.dtype, dense: Callable = Dense, *kinds: type
) -> Network:
    """The full-precision network of one block.

    Args:
        model: of the whole transformer.
        dtype: in which it computes.
        dense: builds its linears.
        kinds: of variables beside parameters that `run` will be given.
    """
    network = nnx.eval_shape(
        lambda: build_transformer(
            one_layer(model), key=jax.random.key(0), dense=dense, dtype=dtype, remat="none"
        )
    )
    graphdef, shapes, *rest = nnx.split(network, nnx.Param, *kinds)
    rest = tuple(nnx.to_pure_dict(each) for each in rest)
    return Network(graphdef, nnx.to_pure_dict(shapes), rest=rest)


@partial(jax.jit, static_argnums=(0, 1))
def _run(network: Network, kind: str, params: dict, args: tuple) -> Any:
    return network.run(kind, params, args)


def on_devices(params: Mapping, mesh: Mesh | None) -> Mapping:
    """Parameters on the default device, or whole on every device of the mesh."""
    return jax.device_put(params, None if mesh is None else sharding.whole(mesh))


def spread(batch: Any, mesh: Mesh | None) -> Any:
    """Arrays `[batch, ...]` on the default device, or their samples over all devices."""
    return jax.device_put(batch, None if mesh is None else sharding.samples(mesh))


def run_stage(
    network: Network, stage: Stage, params: Mapping, batches: Sequence[tuple], mesh: Mesh | None
) -> list[tuple]:
    """One stage over all batches; between stages they wait in the host's memory.

    Args:
        network: full precision or packed.
        stage: which.
        params: of this stage.
        batches: the arguments of each, host arrays.
        mesh: whose devices share a batch; None for one device.

    Returns:
        The arguments of the next stage by batch; `(prediction,)` each behind the head.
    """
    params, found = on_devices(params, mesh), []
    with sharding.under(mesh):
        for args in batches:
            y = jax.device_get(_run(network, stage.kind, params, spread(args, mesh)))
            if stage.kind == "block":
                y = (y, args[1])
            found.append((y,) if stage.kind == "head" else y)
    return found


def in_batches(arrays: Sequence[np.ndarray], size: int) -> list[tuple]:
    """Arrays `[samples, ...]` as batches of `size` rows, which divides their number."""
    starts = range(0, len(arrays[0]), size)
    return [tuple(np.asarray(array[at : at + size]) for array in arrays) for at in starts]


def predict(
    network: Network,
    model: TransformerConfig,
    params: Mapping,
    batches: Sequence[tuple],
    mesh: Mesh | None,
) -> np.ndarray:
    """The whole transformer, streamed: its prediction for all batches, float32."""
    for stage in stages_of(model):
        batches = run_stage(network, stage, part_of(params, stage), batches, mesh)
    return np.concatenate([np.asarray(y, np.float32) for (y,) in batches])
