"""A trained student, or linears that are packed already, to a folder with a packed transformer."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert import progress
from convert.load import find_folder, read_default_steps
from convert.names import Entry
from convert.packed import named_tensors, split_table, to_packed, unquantized
from convert.save import write_json
from convert.tables import table_for
from convert.tensors import read_json, write_tensors
from convert.time_table import fold_names, fold_time, visited_timesteps
from convert.travel import copy_companions
from qvgen_jax.diffusion.schedulers import scheduler_from_json
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, config_from_json, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.low_rank import merge_adapters
from qvgen_jax.quant.packed import quantization_config

# Hidden: it does not travel with a copy of the pipeline, which is then no longer ours to replace.
_MARKER = ".qvgen_jax_export"


def export_pipeline(
    source: str | Path,
    folder: str | Path,
    model: TransformerConfig,
    params: Mapping,
    quant: QuantConfig,
    generation: Mapping[str, Any] | None = None,
    *,
    levels: Mapping | None = None,
) -> None:
    """Writes a folder of the same layout as `source`, its transformer packed.

    The folder appears only when it is complete; an earlier export in its place is replaced.

    Args:
        source: the pipeline that the student came from; everything but its transformer's
            weights is copied, licence and model card with it.
        folder: where to write.
        model: the transformer's sizes.
        params: the student's, without a low-rank branch. A merged adapter (`quant.merged`) is added
            to the weights here, as training does before it quantizes them.
        quant: how it was quantized. With `time_table`, the linears that see only the timestep are
            stored as what they say in `source`'s default number of steps and in `table_steps`.
        generation: defaults of `generate` that it was made for, see
            `qvgen_jax.generation_config`, in place of `source`'s; 0 is a field left out.
        levels: of the student's state; needed where tokens are smoothed.

    Raises:
        UserError: the student still has its branch, or `folder` or `FOLDER.partial` holds
            something else than an export.
    """
    params = merge_adapters(params) if quant.merged else params
    _refuse_branch(params)
    quant = dataclasses.replace(quant, rank=0)  # The config's is that of step 0.
    source, folder = _checked(source, folder)
    table, params, quant = _with_table(source, model, params, quant)
    tensors = to_packed(table, params, quantizable(model), quant, levels)
    _write(source, folder, tensors, quant, generation)


def export_layers(
    source: str | Path,
    folder: str | Path,
    model: TransformerConfig,
    params: Mapping,
    quant: QuantConfig,
    layers: Mapping[str, list[dict]],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """`export_pipeline` of linears that are packed already, a low-rank branch with them.

    Args:
        layers: by the name of every quantized linear its tensors, a dict for each block's.

    The others, and what is raised, are as in `export_pipeline`; of `params` nothing is read that is
    quantized.
    """
    source, folder = _checked(source, folder)
    table, params, quant = _with_table(source, model, params, quant)
    names = quantizable(model)
    tensors = unquantized(table, params, names, quant)
    for name, entry in split_table(table, quant.quantized(names))[0].items():
        tensors |= named_tensors(entry, layers[name])
    _write(source, folder, tensors, quant, generation)


def check_export(source: str | Path, folder: str | Path) -> TransformerConfig:
    """See that an export of this pipeline can be written there.

    Returns:
        The pipeline's transformer, by its config.json; its weights are not looked at.

    Raises:
        UserError: see `export_pipeline`; or the pipeline is quantized already.
    """
    source, _ = _checked(source, folder)
    fields = read_json(source / "transformer" / "config.json")
    if fields.get("quantization_config"):
        raise UserError(
            f"{source} is quantized already; give the full-precision pipeline that it came from"
        )
    return config_from_json(fields)


def _checked(source: str | Path, folder: str | Path) -> tuple[Path, Path]:
    source, folder = find_folder(source), Path(folder)
    if folder.resolve() == source.resolve():
        raise UserError(f"{folder} is the pipeline itself; choose another folder for the export")
    if folder.exists() and any(folder.iterdir()) and not (folder / _MARKER).is_file():
        raise UserError(
            f"{folder} is not empty and no earlier export (it has no {_MARKER}); choose another "
            "folder, or delete it"
        )
    return source, folder


def _with_table(
    source: Path, model: TransformerConfig, params: Mapping, quant: QuantConfig
) -> tuple[list[Entry], Mapping, QuantConfig]:
    """Name table, params and quantization, with a time table where that is asked for."""
    table = table_for(model)
    if not quant.time_table:
        return table, params, quant
    steps = (read_default_steps(source, model), *quant.table_steps)
    scheduler = scheduler_from_json(read_json(source / "scheduler/scheduler_config.json"))
    timesteps = visited_timesteps(scheduler, steps)
    params, table = fold_time(model, params, timesteps), fold_names(table, model)
    steps = tuple(sorted(set(steps)))
    return (
        table,
        params,
        dataclasses.replace(quant, table_steps=steps, time_entries=len(timesteps)),
    )


def _write(
    source: Path,
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    quant: QuantConfig,
    generation: Mapping[str, Any] | None,
) -> None:
    fields = read_json(source / "transformer" / "config.json")
    partial = progress.start_over(folder, {"task": "packed export"})
    copy_companions(source, partial)
    fields = {**fields, "quantization_config": quantization_config(quant)}
    write_json(partial / "transformer" / "config.json", fields)
    write_tensors(partial / "transformer" / "diffusion_pytorch_model.safetensors", tensors)
    _write_generation(partial / "generation_config.json", generation or {})
    (partial / _MARKER).touch()
    shutil.rmtree(folder, ignore_errors=True)
    progress.finish(partial, folder)


def _write_generation(path: Path, changes: Mapping[str, Any]) -> None:
    there = read_json(path) if path.is_file() else {}
    fields = {name: value for name, value in there.items() if name not in changes}
    fields |= {name: value for name, value in changes.items() if value}
    if fields != there:
        write_json(path, fields)


def _refuse_branch(params: Mapping) -> None:
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    branches = [path for path in paths if path[-1].key == "L"]
    if branches:
        name = ".".join(part.key for part in branches[0][:-1])
        raise UserError(
            f"the student still has {len(branches)} low-rank branches (such as {name}): packed "
            "weights have no place for them; train until the rank is 0, then export"
        )
