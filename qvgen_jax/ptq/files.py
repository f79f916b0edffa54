"""What a quantization leaves on disk while it goes on, so that it can be continued."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.ptq.engine import Done, Tensors
from qvgen_jax.ptq.stages import Stage
from qvgen_jax.ptq.trajectory import Inputs

_TASK, _INPUTS = "task.json", "inputs.safetensors"


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
        path, task = self.folder / _TASK, json.loads(json.dumps(task))
        if path.is_file():
            _compare(path, read_object(path, "delete its folder"), task)
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(path, task)

    def inputs(self) -> Inputs | None:
        """The calibration inputs, if they were sampled."""
        path = self.folder / _INPUTS
        return Inputs(**load_file(path)) if path.is_file() else None

    def keep_inputs(self, inputs: Inputs) -> None:
        """Write them down."""
        self._write(_INPUTS, inputs._asdict())

    def stage(self, stage: Stage) -> tuple[Tensors, dict] | None:
        """A finished stage's tensors, and its errors and seconds."""
        path = self.folder / _name(stage)
        if not path.is_file():
            return None
        tensors: Tensors = {}
        for key, array in load_file(path).items():
            name, _, leaf = key.rpartition(".")
            tensors.setdefault(name, {})[leaf] = array
        told = read_object(path.with_suffix(".json"), "delete its folder")
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


def _compare(path: Path, there: Mapping, task: Mapping) -> None:
    differs = [key for key in task if there.get(key) != task[key]]
    if differs:
        key = differs[0]
        raise UserError(
            f"{path.parent} is of a quantization with {key}={there.get(key)!r}, this one has "
            f"{task[key]!r}; give another --workdir, or delete the folder"
        )
