"""Safetensors folders: one file or many behind an index, read one tensor at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qvgen_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is missing; expected a pipeline folder in diffusers' layout: "
            "model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} does not read as JSON ({error}); fetch or write it anew"
        ) from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} holds a {type(fields).__name__}, expected a JSON object")
    return fields


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a component's folder by PyTorch name, each read when it is asked for.

    bfloat16 arrives as `ml_dtypes.bfloat16`. At any time only what the caller keeps is in memory.

    Raises:
        UserError: the folder holds no safetensors, or a file is cut short or missing.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._where = self._read_index()

    def _read_index(self) -> dict[str, str]:
        indexes = sorted(self._folder.glob("*.safetensors.index.json"))
        if indexes:
            where = read_json(indexes[0]).get("weight_map")
            if not isinstance(where, dict):
                raise UserError(f"{indexes[0]} has no weight_map; fetch the folder again")
            return where
        files = sorted(self._folder.glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"{self._folder} holds {len(files)} .safetensors files and no index: expected one "
                "file, or several with a .safetensors.index.json; fetch the folder again"
            )
        return {name: files[0].name for name in self._open(files[0].name).keys()}  # noqa: SIM118

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self._folder / file
            try:
                self._files[file] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{path} does not read ({error}); fetch it again") from error
        return self._files[file]

    def __getitem__(self, name: str) -> np.ndarray:
        file = self._where[name]
        try:
            return self._open(file).get_tensor(name)
        except SafetensorError as error:
            raise UserError(
                f"{self._folder / file} does not give {name} ({error}); fetch it again"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, marked as PyTorch's as transformers demands."""
    # safetensors writes the memory as it lies, whatever the strides say.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
