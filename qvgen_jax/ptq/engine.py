"""A transformer quantized stage by stage, each on what the quantized stages before it say.

For every stage: its linears' tokens are measured in full precision, its linears are quantized, and
the calibration batches go on through the stage *as it is exported* (GPTQ's order, arXiv 2210.17323,
section 3.3: later layers make up for what earlier ones lost). Within a stage all linears are
measured together, before any of them is quantized.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.ptq.stages import (
    Network,
    Stage,
    linears_of,
    one_layer,
    part_of,
    run_stage,
    stages_of,
)
from qvgen_jax.ptq.statistics import Observer
from qvgen_jax.quant.blocks import is_stacked
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import UNCLIPPED
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.packed import pack_tensors, unpack_layer
from qvgen_jax.quant.untrained import Choices, Seen, Untrained, quantize_linear

Tensors = dict[str, dict[str, np.ndarray]]
"""By a linear's name its tensors as `quant.packed` has them."""


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        model: of the transformer.
        quant: what the export will say of itself.
        choices: how each linear is quantized.
        dtype: in which the transformer computes.
        rows: of tokens that each linear's searches see, about.
        seed: of their choice.
        define: `convert.packed.packed_definition`, of a config, a quantization and a dtype.
        mesh: over which samples and output channels go; None for one device.
    """

    model: TransformerConfig
    quant: QuantConfig
    choices: Choices
    dtype: jnp.dtype
    rows: int
    seed: int
    define: Callable[..., Any]
    mesh: Mesh | None = None


class Done(NamedTuple):
    """A quantized stage.

    Attributes:
        stage: which.
        tensors: of its linears.
        errors: by their names `{"weight", "output"}`, see `Untrained`; empty if it was found.
        seconds: `{"measure", "quantize", "run"}`.
    """

    stage: Stage
    tensors: Tensors
    errors: dict[str, dict[str, float]]
    seconds: dict[str, float]


def quantize_stages(
    plan: Plan,
    params: Mapping,
    batches: Sequence[tuple],
    found: Callable[[Stage], Tensors | None] = lambda stage: None,
) -> Iterator[Done]:
    """Quantize all stages, one after the other.

    Peak memory of a device: a stage's parameters in full precision, its linears' statistics and one
    batch. In the host's memory: the parameters, and the tokens of all batches.

    Args:
        plan: what to do.
        params: of the full-precision transformer, host arrays.
        batches: latents, timesteps and text of the calibration, host arrays.
        found: the tensors of a stage that an earlier call finished; that stage is only run.

    Raises:
        UserError: a linear's quantization came out as something that is no number.
    """
    packed = _Packed(plan)
    observers: dict[str, Observer] = {}
    for stage in stages_of(plan.model):
        part, seconds, errors = part_of(params, stage), {}, {}
        tensors = found(stage)
        if tensors is None:
            start = time.perf_counter()
            if stage.kind not in observers:
                observers[stage.kind] = _observer(plan, stage, len(batches))
            seen = jax.block_until_ready(observers[stage.kind](part, batches, plan.mesh))
            seconds["measure"], start = _since(start)
            tensors, errors = _quantize(plan, stage, part, seen)
            seconds["quantize"], _ = _since(start)
        start = time.perf_counter()
        if stage.kind != "head":
            batches = packed.run(stage, part, tensors, batches)
        seconds["run"], _ = _since(start)
        yield Done(stage, tensors, errors, seconds)


def _since(start: float) -> tuple[float, float]:
    now = time.perf_counter()
    return now - start, now


def names_in(plan: Plan, stage: Stage) -> list[str]:
    """The linears of a stage that are quantized."""
    quantized = plan.quant.quantized(quantizable(plan.model))
    return [name for name in linears_of(stage.kind, plan.model) if name in quantized]


def _observer(plan: Plan, stage: Stage, batches: int) -> Observer:
    return Observer(
        plan.model,
        plan.dtype,
        stage.kind,
        names_in(plan, stage),
        rows=-(-plan.rows // batches),
        seed=plan.seed,
        moments=plan.choices.rounding == "gptq",
    )


def _quantize(
    plan: Plan, stage: Stage, part: Mapping, seen: Mapping[str, Seen]
) -> tuple[Tensors, dict[str, dict[str, float]]]:
    """The tensors of a stage's linears and their errors."""
    tensors, errors, quant = {}, {}, of_stage(plan.quant, plan.model, stage)
    for name, tokens in seen.items():
        node = layer_at(part, name)
        if stage.kind == "block":
            node = {key: leaf[0] for key, leaf in node.items()}
        bits = quant.bits_of(name)
        levels = tuple(jnp.float32(2**width - 1) for width in bits)
        kernel = _cut(node["kernel"], plan.mesh)
        block = quant.block_of(name, kernel.shape[0])
        made = jax.device_get(quantize_linear(kernel, tokens, levels, plan.choices, block))
        errors[name] = {"weight": float(made.weight_error), "output": float(made.output_error)}
        if not np.isfinite(errors[name]["output"]):
            raise UserError(
                f"{name} of {stage} came out as {errors[name]}, expected numbers: its tokens go "
                "together too closely for float32, or are not finite themselves; raise "
                "--config.calibration.damping, or choose another --method"
            )
        tensors[name] = _tensors(made, node.get("bias"), bits[0])
    return tensors, errors


def _cut(kernel: np.ndarray, mesh: Mesh | None) -> jax.Array:
    """A kernel `[in, out]` with its output channels over all devices, if they divide."""
    if mesh is None:
        return jnp.asarray(kernel)
    axes = AXES if kernel.shape[1] % mesh.size == 0 else None
    return jax.device_put(kernel, NamedSharding(mesh, P(None, axes)))


def _tensors(made: Untrained, bias: Any, bits: int) -> dict[str, np.ndarray]:
    codes = made.codes.T.astype(np.int16) + 2 ** (bits - 1)
    clip = np.full((1,), UNCLIPPED, np.float32)
    layer = {"scale": made.scale, "zero_point": made.zero_point, "smooth": made.factors}
    layer |= {"lower": clip, "upper": clip, "bias": bias}
    return pack_tensors(codes, layer, bits, branch=made.branch)


def of_stage(quant: QuantConfig, model: TransformerConfig, stage: Stage) -> QuantConfig:
    """What the network of one block that runs a stage is built with.

    A time table is made when all is exported: until then its linears say what they say.
    """
    quant = dataclasses.replace(quant, time_table=False)
    if not quant.by_block:
        return quant
    stacked = [name for name in quant.quantized(quantizable(model)) if is_stacked(name)]
    return quant.with_widest(stacked, [stage.index])


class _Packed:
    """The networks of one block that an export is loaded into: one for all blocks of equal bits."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._known: dict[str, tuple[Any, Network]] = {}

    def _of(self, stage: Stage) -> tuple[Any, Network]:
        """The definition, and the network."""
        plan = self._plan
        quant = of_stage(plan.quant, plan.model, stage)
        key = repr(sorted(quant.bits.items()))
        if key not in self._known:
            given = plan.define(one_layer(plan.model), quant, plan.dtype)
            network = Network(given.graphdef, given.shapes, fixed=(given.levels,))
            self._known[key] = given, network
        return self._known[key]

    def run(self, stage: Stage, part: Mapping, tensors: Tensors, batches: Sequence) -> list[tuple]:
        """The batches behind a stage whose quantized linears are as `qvgen_jax.load` has them."""
        (given, network), params = self._of(stage), dict(part)
        quant = of_stage(self._plan.quant, self._plan.model, stage)
        for name, packed in tensors.items():
            inner, layout = given.inputs[name], given.layouts[name]
            node = unpack_layer(packed, quant.bits_of(name)[0], inner, layout)
            if stage.kind == "block":
                node = {key: leaf[None] for key, leaf in node.items()}
            params = with_layer(params, name, node)
        return run_stage(network, stage, params, batches, self._plan.mesh)
