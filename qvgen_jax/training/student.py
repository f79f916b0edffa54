"""The student of a run: which layers are quantized, how, and when their branch shrinks."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from qvgen_jax.errors import UserError
from qvgen_jax.models import (
    TransformerConfig,
    build_transformer,
    quantizable,
    text_only,
    time_only,
    values_of,
)
from qvgen_jax.quant.blocks import is_stacked, ranges, split_block
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.schedule import RankDecay, phase_steps_for

_BEHAVIOURS = ("default", "released")
_PASSED_ON = (
    "act_range",
    "branch_space",
    "buckets",
    "symmetric_weights",
    "rotation",
    "smoothing",
    "time_table",
)


def quant_config(quant: Mapping, model: TransformerConfig) -> QuantConfig:
    """The `quant` section of a config as the quantizers read it.

    Raises:
        UserError: an unknown behaviour, a layer or block that the model does not have, or bits for
            a layer that stays in full precision.
    """
    if quant["behaviour"] not in _BEHAVIOURS:
        raise UserError(
            f"quant.behaviour={quant['behaviour']!r}; expected one of {', '.join(_BEHAVIOURS)}"
        )
    chosen = {
        "weight_bits": quant["weight_bits"],
        "act_bits": quant["act_bits"],
        "rank": quant["rank"],
        "full_precision": tuple(quant["full_precision"]),
        "product_dtype": quant["product_dtype"],
        "bits": {name: (weights, acts) for name, weights, acts in quant["bits"]},
        **{name: quant[name] for name in _PASSED_ON},
    }
    if quant["include_zero"]:
        chosen["include_zero"] = quant["include_zero"] == "yes"
    if quant["clip_index"]:
        chosen["clip_index"] = quant["clip_index"]
    if quant["time_table"]:
        kept = (*chosen["full_precision"], *time_only(model))
        chosen["full_precision"] = tuple(dict.fromkeys(kept))
        chosen["table_steps"] = tuple(quant["table_steps"])
    if chosen["rotation"] != "none" or chosen["smoothing"]:
        chosen["folded"] = {
            name: source
            for name, source in values_of(model).items()
            if name not in chosen["full_precision"]
        }
    if quant["behaviour"] == "released":
        config = QuantConfig.released(**chosen)
    else:
        single = tuple(name for name in text_only(model) if name not in chosen["full_precision"])
        config = QuantConfig(single_clip=single, **chosen)
    names = config.quantized(quantizable(model))
    config.check_blocks(model.num_layers)
    for name in config.bits:
        if split_block(name)[1] not in names:
            raise UserError(
                f"quant.bits asks {config.bits[name]} bits of {name!r}, which stays in full "
                "precision (quant.full_precision, or quant.time_table for the timestep's own); "
                "take it out of one of them"
            )
    return config


def rank_decay(config: Mapping) -> RankDecay:
    """When the branch shrinks, from the `quant` and `train` sections; never, if it is merged."""
    quant, steps = config["quant"], config["train"]["steps"]
    if quant["branch_space"] == "merged":  # At full weight to the last step, and after it.
        return RankDecay(steps + 1, quant["rank"], shape="abrupt")
    shape, order = quant["decay_shape"], quant["decay_order"]
    phase = phase_steps_for(steps, quant["decay_fraction"], quant["rank"], quant["shrink"], shape)
    return RankDecay(phase, quant["rank"], quant["shrink"], shape, order, quant["refactor"])


def tail_start(config: Mapping) -> int:
    """Where a constant tail of the learning rates begins: where the branch ends, or would."""
    return int(config["train"]["steps"] * config["quant"]["decay_fraction"])


def student_definition(
    model: TransformerConfig,
    quant: QuantConfig,
    dtype: jnp.dtype,
    *,
    branch: bool,
    remat: str = "none",
) -> nnx.GraphDef:
    """The quantized network described; at rank 0 there is no `branch` any more."""
    quant = quant if branch else dataclasses.replace(quant, rank=0)
    student = nnx.eval_shape(
        lambda: build_transformer(
            model,
            key=jax.random.key(0),
            dense=dense_factory(quant, "train"),
            dtype=dtype,
            clip_mode=quant.clip_index,
            buckets=quant.buckets,
            remat=remat,
        )
    )
    return nnx.split(student, nnx.Param, Levels)[0]


def describe_layers(model: TransformerConfig, quant: QuantConfig) -> str:
    """One line per kind of layer: what is quantized to how many bits, and what is not."""
    names = quantizable(model)
    lines = []
    for name in names:
        count = model.num_layers if is_stacked(name) else 1
        kind = _kinds(quant.blocks_by_bits(name, count if is_stacked(name) else None))
        if name in quant.full_precision:
            table = quant.time_table and name in time_only(model)
            kind = "full precision" + (", a table in the export" if table else "")
        learned = "learned steps" if quant.learned_steps else "clip pairs"
        clips = "" if name in quant.full_precision else f", {quant.buckets_of(name)} {learned}"
        lines.append(f"  {name:45s} x {count:3d}  {kind}{clips}")
    total = sum(model.num_layers if is_stacked(n) else 1 for n in names)
    patches = "" if "patch_embed.proj" in names else "patch embedding, "
    kept = f"  {patches}norms, modulation tables, attention products    full precision"
    before = [f"smoothed by {quant.smoothing}"] if quant.smoothing else []
    before += [f"rotated ({quant.rotation})"] if quant.rotation != "none" else []
    ready = [f"  tokens {', then '.join(before)}, before they are quantized"] if before else []
    if quant.merged:
        ready.append(f"  kernels have an adapter of rank {quant.rank}, merged and then quantized")
    return "\n".join([f"{total} linears:", *lines, *ready, kept])


def _kinds(blocks: Mapping[tuple[int, int], list[int]]) -> str:
    """`W4A4`, or `W4A4 (blocks 0-3,5), W8A8 (blocks 4)`."""
    kinds = {f"W{weights}A{acts}": held for (weights, acts), held in blocks.items()}
    if len(kinds) == 1:
        return next(iter(kinds))
    return ", ".join(f"{kind} (blocks {ranges(held)})" for kind, held in kinds.items())
