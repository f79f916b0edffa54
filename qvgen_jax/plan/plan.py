"""A run planned: memory, work, traffic and time on a target, and whether it fits."""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax.numpy as jnp

from kernels.attention import choose_attention
from kernels.attention_call import AttentionCall
from kernels.explain import Row, explain
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import check_slices, sizes_of_config
from qvgen_jax.models import quantizable
from qvgen_jax.models.attention import exchange
from qvgen_jax.models.linears import attended, linears, quantized_products
from qvgen_jax.plan import ahead
from qvgen_jax.plan.collectives import Collective
from qvgen_jax.plan.memory import Memory, estimate
from qvgen_jax.plan.pace import Pace, pace
from qvgen_jax.plan.shapes import Run, read_run
from qvgen_jax.plan.target import Target
from qvgen_jax.plan.traffic import estimated, kernel_sizes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.training.check import check_config
from qvgen_jax.training.operations import step_work
from qvgen_jax.training.student import quant_config

SPARE = 0.1
"""Of a device's memory, left for fragments, the runtime and what no estimate knows."""

Work = Mapping[tuple[str, str], int]


class Plan(NamedTuple):
    """Everything a report says.

    Attributes:
        run, target: what is planned, and where.
        sizes: of the mesh's axes.
        parameters: of the teacher, and those in quantized kernels.
        memory: the estimate.
        compiled: what the compiler said; its refusal; None where it was not asked.
        work: multiply-adds of one sample, see `qvgen_jax.training.operations.step_work`.
        moved: collectives of a step.
        pace: seconds of a step; None where the chip's peaks are not known.
        attention: of each attention of a block the backend and its reason.
        layers: what multiplies an export's codes on this chip.
    """

    run: Run
    target: Target
    sizes: dict[str, int]
    parameters: tuple[int, int]
    memory: Memory
    compiled: ahead.Compiled | ahead.Refused | None
    work: Work
    moved: tuple[Collective, ...]
    pace: Pace | None
    attention: tuple[tuple[int, int, str, str], ...]
    layers: tuple[Row, ...]

    @property
    def operations(self) -> int:
        """Of a step, of all devices; a multiply-add is two."""
        return 2 * self.run.config["train"]["batch_size"] * sum(self.work.values())

    @property
    def need(self) -> int:
        """Bytes of a device: what the compiler lays out, else the estimate."""
        measured = isinstance(self.compiled, ahead.Compiled)
        return self.compiled.laid_out if measured else self.memory.peak

    @property
    def fits(self) -> bool | None:
        """Whether that leaves `SPARE`; None where the chip's memory is not known."""
        if isinstance(self.compiled, ahead.Refused):
            return False
        return self.need <= (1 - SPARE) * self.target.memory if self.target.memory else None

    @property
    def exchange(self) -> str:
        """How self-attention goes over `context`."""
        return exchange(
            self.run.model.num_attention_heads, self.sizes["context"], self.sizes["tensor"]
        )


def make_plan(config: Mapping, target: Target, *, compiler: bool = True) -> Plan:
    """The plan of a training config.

    Args:
        config: plain dicts.
        target: to run on.
        compiler: whether to ask the target's own, where it is installed: minutes for a large model.

    Raises:
        UserError: a wrong config, or a mesh that does not divide.
    """
    check_config(config)
    run = read_run(config)
    across = _across(config, target)
    sizes = sizes_of_config(config, target.devices)
    memory = estimate(run, sizes, target.chip.platform)
    compiled = None
    if compiler and target.here:
        compiled = ahead.measure(ahead.lower_step(config, target, sizes))
    elif compiler and ahead.compiler_for(target):
        compiled = ahead.compile_step(config, target, sizes)
    counted = isinstance(compiled, ahead.Compiled)
    moved = tuple(compiled.collectives if counted else estimated(run, sizes, across))
    quant = quant_config(config["quant"], run.model)
    names = quant.quantized(quantizable(run.model))
    shape, train = (run.model, run.tokens, run.text_tokens), config["train"]
    asked = train["target"] == "teacher"
    blocks = _rotated(run, quant, names)
    work = step_work(*shape, quant.token_rank, train["remat"], names, blocks=blocks, teacher=asked)
    operations = 2 * config["train"]["batch_size"] * sum(work.values())
    quantized, every = kernel_sizes(run)
    return Plan(
        run=run,
        target=target,
        sizes=sizes,
        parameters=(every, quantized),
        memory=memory,
        compiled=compiled,
        work=work,
        moved=moved,
        pace=pace(target, operations, moved),
        attention=_attention(run, target, sizes),
        layers=_layers(run, target),
    )


def _rotated(run: Run, quant: QuantConfig, names: Collection[str]) -> dict[str, int]:
    """Of the linears that rotate their tokens: how many channels each mixes."""
    widths = {each.name: each.inner for each in linears(run.model, run.tokens, run.text_tokens)}
    blocks = {name: quant.own_block_of(name, widths[name]) for name in names}
    return {name: block for name, block in blocks.items() if block > 1}


def _across(config: Mapping, target: Target) -> dict[str, int]:
    """What goes over the network between slices of TPUs, by axis.

    Raises:
        UserError: that is not as many slices as the target has.
    """
    if target.chip.platform != "tpu":
        return {}
    across = config["mesh"]["across_slices"]
    check_slices(across, target.slices, f"the {target.devices} devices of {target.name}")
    return dict(across)


def _attention(run: Run, target: Target, sizes: Mapping[str, int]) -> tuple:
    model, train = run.model, run.config["train"]
    held = train["batch_size"] // train["accumulate"] // (sizes["data"] * sizes["fsdp"])
    dtype = jnp.dtype(run.config["compute_dtype"])
    found = []
    for queries, keys in attended(model, run.tokens, run.text_tokens):
        heads = model.num_attention_heads // sizes["tensor"]
        call = AttentionCall(held, queries, keys, heads, model.attention_head_dim, dtype)
        try:
            found.append((queries, keys, *choose_attention(target.chip.platform, call)))
        except (NotImplementedError, ValueError) as refusal:
            raise UserError(f"QVGEN_ATTENTION: {refusal}") from refusal
    return tuple(found)


def _layers(run: Run, target: Target) -> tuple[Row, ...]:
    quant = quant_config(run.config["quant"], run.model)
    products = quantized_products(run.model, run.tokens, run.text_tokens, quant)
    return tuple(explain(products, target.chip, run.config["kernels"]))
