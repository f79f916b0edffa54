"""What a quantization leaves on disk while it goes on, so that it can be continued."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.ptq.engine import Done, Plan, Tensors, names_in
from qvgen_jax.ptq.stages import Stage
from qvgen_jax.ptq.trajectory import Inputs
from qvgen_jax.quant.packed import leaves_of

RECORD = "quantize.json"
_TASK, _INPUTS = "task.json", "inputs.safetensors"
_REMEDY = "delete its folder"


def is_done(workdir: Path, task: Mapping) -> bool:
    """Whether a workdir holds this quantization, finished.

    Raises:
        UserError: it holds another one, or a record that does not say which.
    """
    path = workdir / RECORD
    if not path.is_file():
        return False
    there = read_object(path, _REMEDY).get("task")
    _compare(path, there if isinstance(there, dict) else {}, _as_read(task))
    return (workdir / "export" / "model_index.json").is_file()


class Unfinished:
    """The folder `WORKDIR/quantize.partial`: the task, calibration inputs and finished stages.

    Every file is there whole or not at all. What a stage is quantized to depends on the inputs and
    the stages before it alone, so that one that goes on ends where one in one go does.

    Args:
        workdir: of the quantization.
        task: what tells it from any other.

    Raises:
        UserError: the folder holds another task.
    """

    def __init__(self, workdir: Path, task: Mapping):
        self.folder = workdir / "quantize.partial"
        path, task = self.folder / _TASK, _as_read(task)
        if path.is_file():
            _compare(path, read_object(path, _REMEDY), task)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, task)

    def inputs(self) -> Inputs | None:
        """The calibration inputs, if they were sampled.

        Raises:
            UserError: the file is damaged.
        """
        path = self.folder / _INPUTS
        return Inputs(**_arrays(path, Inputs._fields)) if path.is_file() else None

    def keep_inputs(self, inputs: Inputs) -> None:
        """Write them down."""
        self._write(_INPUTS, inputs._asdict())

    def stage(self, stage: Stage, plan: Plan) -> tuple[Tensors, dict] | None:
        """A finished stage's tensors, and its errors and seconds.

        Raises:
            UserError: its files are damaged.
        """
        path = self.folder / _name(stage)
        if not path.is_file():
            return None
        tensors: Tensors = {}
        names = names_in(plan, stage)
        leaves = [f"{name}.{leaf}" for name in names for leaf in leaves_of(plan.quant, name)]
        for key, array in _arrays(path, leaves).items():
            name, _, leaf = key.rpartition(".")
            tensors.setdefault(name, {})[leaf] = array
        told = read_object(path.with_suffix(".json"), _REMEDY)
        _check_names(path.with_suffix(".json"), told, ("errors", "seconds"))
        return tensors, told

    def keep_stage(self, done: Done) -> None:
        """Write a stage down."""
        path = self.folder / _name(done.stage)
        write_json(path.with_suffix(".json"), {"errors": done.errors, "seconds": done.seconds})
        arrays = {
            f"{name}.{leaf}": np.ascontiguousarray(array)
            for name, layer in done.tensors.items()
            for leaf, array in layer.items()
        }
        self._write(path.name, arrays)

    def _write(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        partial = self.folder / f"{name}.tmp"
        save_file(dict(arrays), partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(self.folder / name)

    def delete(self) -> None:
        """All of it, when the export is there."""
        shutil.rmtree(self.folder)


def _name(stage: Stage) -> str:
    return f"{stage.kind}-{stage.index:04}.safetensors"


def _arrays(path: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """What a file holds, which are these."""
    try:
        arrays = load_file(path)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{path} does not read as safetensors ({error}); {_REMEDY}") from error
    _check_names(path, arrays, names)
    return arrays


def _check_names(path: Path, found: Iterable[str], expected: Iterable[str]) -> None:
    if differs := sorted(set(found) ^ set(expected)):
        raise UserError(
            f"{path} holds other names than it was written with, {differs[0]!r} for one; {_REMEDY}"
        )


def _as_read(task: Mapping) -> dict:
    """A task as it is when it comes back from a file."""
    return json.loads(json.dumps(task))


def _compare(path: Path, there: Mapping, task: Mapping) -> None:
    differs = [key for key in task if there.get(key) != task[key]]
    if differs:
        key = differs[0]
        raise UserError(
            f"{path.parent} is of a quantization with {key}={there.get(key)!r}, this one has "
            f"{task[key]!r}; give another --workdir, or delete the folder"
        )
