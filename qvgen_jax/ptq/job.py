"""`--job quantize --method NAME`: an export without training."""

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qvgen_jax import hosts
from qvgen_jax.components import fingerprint
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.samples import read_lines
from qvgen_jax.json_file import write_json
from qvgen_jax.mesh import make_mesh
from qvgen_jax.models import TransformerConfig, abstract_params, quantizable
from qvgen_jax.pipeline import Pipeline, load
from qvgen_jax.ptq.engine import Done, Plan, quantize_stages
from qvgen_jax.ptq.files import RECORD, Unfinished, is_done
from qvgen_jax.ptq.methods import choices_of, quantization
from qvgen_jax.ptq.report import Told, measured, peak_memory
from qvgen_jax.ptq.stages import Stage, in_batches, stages_of
from qvgen_jax.ptq.trajectory import Inputs, batch_rows, sampled_inputs
from qvgen_jax.quant.blocks import bits_label
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.untrained import Choices
from qvgen_jax.training import checkpoint
from qvgen_jax.training.check import check_config, check_unguided
from qvgen_jax.training.lock import alone_in
from qvgen_jax.training.student import quant_config

_WHOLE_RANGE = "without training tokens keep their whole range, which contains 0"
# Keys of `quant` that have no meaning here: what they have to be, and why. Rank, rotation and
# smoothing of training are not read: the method has its own.
_UNTRAINED = {
    "behaviour": (("default",), _WHOLE_RANGE),
    "act_range": (("token",), _WHOLE_RANGE),
    "include_zero": (("", "yes"), _WHOLE_RANGE),
    "branch_space": (("tokens",), "--method chooses it"),
}


class Exporting(NamedTuple):
    """What this job has from `convert`.

    Attributes:
        define: `packed_definition`.
        check: `check_export`.
        write: `export_layers`.
    """

    define: Callable[..., Any]
    check: Callable[..., None]
    write: Callable[..., None]


def run_quantize(config: Mapping, workdir: Path, method: str, exporting: Exporting) -> Path:
    """Quantize `config.model` without training to `WORKDIR/export`, or go on with it.

    Writes `WORKDIR/quantize.json`: what was done, what each linear lost, seconds, bytes, memory.
    One that is done already is left as it is.

    Args:
        config: reads `model`, `quant` (bits and what stays in full precision), `calibration`,
            `data` (the size of the calibration's videos), `seed`, `compute_dtype` and `kernels`.
        workdir: of this quantization; no training run, and no other one, may live there.
        method: one of `qvgen_jax.ptq.methods.METHODS`.
        exporting: of `convert`.

    Returns:
        The export's folder.

    Raises:
        UserError: something of that is wrong, told before anything is computed; or a linear cannot
            be quantized, see `quantize_stages`.
    """
    choices, prompts = _check(config, workdir, method)
    export = workdir / "export"
    model = exporting.check(config["model"], export)
    quant = quantization(quant_config(config["quant"], model), choices)
    parameters = _check_layers(model, quant)
    with alone_in(workdir):
        start = time.perf_counter()
        pipe, plan = _load(config), _plan(config, model, quant, choices, exporting.define)
        task = _task(config, method, plan, prompts, pipe)
        if is_done(workdir, task):
            print(f"{workdir} holds this quantization; delete it to have it done again", flush=True)
            return export
        kept, seconds = Unfinished(workdir, task), {"load": time.perf_counter() - start}
        inputs, seconds["sample"] = _inputs(config, plan, pipe, prompts, kept)
        what = f"{method} {bits_label(quant.weight_bits, quant.act_bits, quant.bits)}"
        done = _run(config, plan, pipe, inputs, kept, Told(len(stages_of(plan.model)), what))
        start, layers = time.perf_counter(), _by_name(done)
        generation = {"unguided_steps": task["unguided_steps"]}
        params = pipe.transformer.states[0]
        exporting.write(config["model"], export, plan.model, params, quant, layers, generation)
        seconds["export"] = time.perf_counter() - start
        told = {
            "method": method,
            "bits": [quant.weight_bits, quant.act_bits],
            "bits_by_layer": {name: list(pair) for name, pair in sorted(quant.bits.items())},
            "choices": choices._asdict(),
            "samples": len(inputs.timesteps),
            "task": task,
            "seconds": {key: round(value, 3) for key, value in seconds.items()},
        }
        told |= measured(done, parameters, export) | peak_memory()
        write_json(workdir / RECORD, told)
        kept.delete()
    return export


def _check(config: Mapping, workdir: Path, method: str) -> tuple[Choices, list[str]]:
    """What needs no model to be seen."""
    check_config(config)
    choices, quant, given = choices_of(method, config), config["quant"], config["calibration"]
    for key, (usual, why) in _UNTRAINED.items():
        if quant[key] not in usual:
            raise UserError(
                f"--config.quant.{key}={quant[key]} is for training; leave it away: {why}"
            )
    if not hosts.is_alone():
        raise UserError(
            f"--job quantize runs in one process, on all its devices, and there are "
            f"{jax.process_count()}; start one alone"
        )
    if checkpoint.is_claimed(workdir):
        raise UserError(
            f"{workdir} holds a training run, whose export would be replaced; give another "
            "--workdir"
        )
    remedy = "a text file with one prompt per line, not those that are judged"
    prompts = read_lines(given["prompts"], given["count"], "calibration.prompts", remedy)
    if len(prompts) < given["count"]:
        raise UserError(
            f"--config.calibration.count={given['count']}, but {given['prompts']} has "
            f"{len(prompts)} prompts; ask for fewer, or add some"
        )
    return choices, prompts


def _load(config: Mapping) -> Pipeline:
    """The pipeline, its transformer in the host's memory."""
    how = {"text_weights": config["text_weights"], "free_text_encoder": True}
    pipe = load(config["model"], config["compute_dtype"], keep_on_host=True, **how)
    check_unguided(config, pipe.defaults["steps"])
    return pipe


def _check_layers(model: TransformerConfig, quant: QuantConfig) -> int:
    """How many parameters the kernels to quantize have."""
    params, total = abstract_params(model), 0
    for name in quant.quantized(quantizable(model)):
        shape = layer_at(params, name)["kernel"].shape
        total += math.prod(shape)
        if quant.rank > min(shape[-2:]):
            raise UserError(
                f"--config.calibration.rank={quant.rank} is more than {name} has, which is "
                f"{shape[-2]} x {shape[-1]}; choose at most {min(shape[-2:])}, or name it in "
                "--config.quant.full_precision"
            )
    return total


def _plan(
    config: Mapping,
    model: TransformerConfig,
    quant: QuantConfig,
    choices: Choices,
    define: Callable,
) -> Plan:
    return Plan(
        model,
        quant,
        choices,
        jnp.dtype(config["compute_dtype"]),
        config["calibration"]["rows"],
        config["seed"],
        partial(define, backend=config["kernels"]),
        None if jax.device_count() == 1 else make_mesh({"fsdp": -1}),
    )


def _task(
    config: Mapping, method: str, plan: Plan, prompts: list[str], pipe: Pipeline
) -> dict[str, Any]:
    """What decides the result."""
    size = ("num_frames", "height", "width", "max_length")
    return {
        "method": method,
        "choices": plan.choices._asdict(),
        "quant": repr(plan.quant),
        "calibration": dict(config["calibration"]),
        "data": {key: config["data"][key] for key in size},
        "prompts": prompts,
        "seed": config["seed"],
        "compute_dtype": config["compute_dtype"],
        "kernels": config["kernels"],
        "unguided_steps": config["sample"]["unguided_steps"],
        "scheduler": repr(pipe.scheduler),
        "defaults": dict(pipe.defaults),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "model": fingerprint(pipe.transformer, pipe.text_encoder, pipe.vae),
        "jax": jax.__version__,
    }


def _inputs(
    config: Mapping, plan: Plan, pipe: Pipeline, prompts: list[str], kept: Unfinished
) -> tuple[Inputs, float]:
    """The calibration inputs and the seconds they took; 0 if they were there."""
    inputs, start = kept.inputs(), time.perf_counter()
    if inputs is not None:
        return inputs, 0.0
    print(f"sampling {len(prompts)} prompts in full precision", flush=True)
    how = (config["calibration"], config["data"], config["seed"], plan.dtype, plan.mesh)
    inputs = sampled_inputs(pipe, prompts, *how)
    kept.keep_inputs(inputs)
    return inputs, time.perf_counter() - start


def _run(
    config: Mapping, plan: Plan, pipe: Pipeline, inputs: Inputs, kept: Unfinished, told: Told
) -> list[Done]:
    """Every stage, from disk where it is there."""
    devices = 1 if plan.mesh is None else plan.mesh.size
    most = config["calibration"]["batch_size"]
    rows = batch_rows(len(inputs.timesteps), most, devices)
    there: dict[Stage, dict] = {}

    def found(stage: Stage) -> dict | None:
        known = kept.stage(stage, plan)
        if known is None:
            return None
        there[stage] = known[1]
        return known[0]

    finished = []
    params, batches = pipe.transformer.states[0], in_batches(inputs, rows)
    for done in quantize_stages(plan, params, batches, found):
        if done.stage in there:
            done = done._replace(**there[done.stage])
        else:
            kept.keep_stage(done)
        told(done, done.stage in there)
        finished.append(done)
    return finished


def _by_name(done: list[Done]) -> dict[str, list[dict]]:
    """By a linear's name its tensors, those of all blocks in their order."""
    layers: dict[str, list[dict]] = {}
    for each in done:
        for name, tensors in each.tensors.items():
            layers.setdefault(name, []).append(tensors)
    return layers
