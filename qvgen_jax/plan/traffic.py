"""Bytes that arrive at each device in a step: an estimate, where no compiler counts them."""

import math
from collections.abc import Mapping
from functools import partial

from qvgen_jax.models import abstract_params, quantizable
from qvgen_jax.models.attention import exchange
from qvgen_jax.plan.collectives import BETWEEN_SLICES, Collective
from qvgen_jax.plan.shapes import Run
from qvgen_jax.quant.blocks import is_stacked
from qvgen_jax.quant.named import layer_at
from qvgen_jax.training.loop import undrawn_state
from qvgen_jax.training.optimizer import split_frozen
from qvgen_jax.training.student import quant_config
from qvgen_jax.training.teacher import byte_linears


def kernel_sizes(run: Run) -> tuple[int, int]:
    """Elements of all the kernels that are quantized, and of all parameters of the teacher."""
    import jax

    params = abstract_params(run.model)
    names = quant_config(run.config["quant"], run.model).quantized(quantizable(run.model))
    quantized = sum(math.prod(layer_at(params, name)["kernel"].shape) for name in names)
    return quantized, sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _trained_size(run: Run) -> int:
    """Elements of what trains beside frozen weights."""
    import jax

    state = jax.eval_shape(
        partial(undrawn_state, run.config, run.model), abstract_params(run.model)
    )
    trained, _ = split_frozen(state["params"], freeze_weights=True)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained))


def _teacher_sizes(run: Run, every: int, dtype: str, width: int) -> dict[str, int]:
    """Bytes of the teacher that travel, by type; `every` of its elements."""
    names, params = byte_linears(run.config["train"], run.model), abstract_params(run.model)
    codes = sum(math.prod(layer_at(params, name)["kernel"].shape) for name in names)
    return {**({"s8": codes} if codes else {}), dtype: width * (every - codes)}


def estimated(
    run: Run, sizes: Mapping[str, int], across: Mapping[str, int] | None = None
) -> list[Collective]:
    """What a step has to move, without what a compiler may add or save.

    Args:
        run: what trains.
        sizes: of the mesh's axes.
        across: how much of `data` and `fsdp` goes over the network between slices.
    """
    train = run.config["train"]
    quantized, every = kernel_sizes(run)
    trained = _trained_size(run) if train["freeze_weights"] else every
    quantized, every, trained = (size // sizes["tensor"] for size in (quantized, every, trained))
    width = 2 if run.config["compute_dtype"] == "bfloat16" else 4
    dtype = "bf16" if width == 2 else "f32"
    times = train["accumulate"]
    again = train["remat"] != "none"
    found = []

    def add(kind: str, dtype: str, devices: int, count: int, arriving: float) -> None:
        if devices > 1:
            found.append(Collective(kind, dtype, devices, count, int(arriving)))

    layers = run.model.num_layers
    across = {"data": 1, "fsdp": 1} | dict(across or {})
    within = {axis: size // across.get(axis, 1) for axis, size in sizes.items()}
    fsdp = within["fsdp"]
    others = (fsdp - 1) / fsdp
    passes = times * (2 if again else 1)
    # Codes are one byte; the layers of a block are gathered one by one.
    per_block = len([name for name in quantizable(run.model) if is_stacked(name)])
    add("all-gather", "s8", fsdp, passes * layers * per_block, passes * quantized * others)
    held = _teacher_sizes(run, every, dtype, width) if train["target"] == "teacher" else {}
    for held_dtype, size in held.items():
        add("all-gather", held_dtype, fsdp, times * layers * per_block, times * size * others)
    add("reduce-scatter", "f32", fsdp, times * layers * per_block, times * 4 * trained * others)
    for axis in ("data", "context"):
        share = 2 * (within[axis] - 1) / within[axis]
        add("all-reduce", "f32", within[axis], layers * per_block, share * 4 * trained / fsdp)
    if (slices := across["fsdp"]) > 1:
        # Each device fetches its share of what other slices hold; the slice's links spread it.
        share, count = (slices - 1) / slices / fsdp, layers * per_block
        add(BETWEEN_SLICES, "s8", slices, passes * count, passes * quantized * share)
        for held_dtype, size in held.items():
            add(BETWEEN_SLICES, held_dtype, slices, times * count, times * size * share)
        add(BETWEEN_SLICES, "f32", slices, times * count, times * 4 * trained * share)
    if (slices := across["data"]) > 1:
        # Gradients, after each part of an accumulated batch; who holds the same shares the way.
        share = 2 * (slices - 1) / slices / sizes["fsdp"] / within["data"] / within["context"]
        count = times * layers * per_block
        add(BETWEEN_SLICES, "f32", slices, count, times * 4 * trained * share)
    _add_tokens(run, sizes, add, dtype, width, again)
    return sorted(found, key=lambda c: -c.bytes)


def _add_tokens(run, sizes, add, dtype: str, width: int, again: bool) -> None:
    """Self-attention over the devices that share a sample."""
    context, tensor = sizes["context"], sizes["tensor"]
    train, model = run.config["train"], run.model
    samples = train["batch_size"] / (sizes["data"] * sizes["fsdp"])
    whole = samples * run.block_tokens * model.dim * width / tensor
    # Teacher, student, recomputed; the backward pass moves as much the other way.
    passes = model.num_layers * (3 + again)
    if exchange(model.num_attention_heads, context, tensor) == "keys":
        add("all-gather", dtype, context, 2 * passes, 2 * passes * whole * (context - 1) / context)
    else:
        moved = whole / context * (context - 1) / context
        add("all-to-all", dtype, context, 4 * passes, 4 * passes * moved)
