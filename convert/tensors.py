"""Safetensors folders: one file or many behind an index, read one tensor at a time."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from convert.safetensors_file import (
    Header,
    TensorInfo,
    first_few,
    read_header,
    read_tensor,
)
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
INDEX = ".safetensors.index.json"

_SHARD = re.compile(r"-\d{5}-of-\d{5}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    if not path.exists():
        raise UserError(
            f"{path} is missing; expected a pipeline folder in diffusers' layout: "
            "model_index.json, transformer/, vae/, text_encoder/, tokenizer/, scheduler/"
        )
    return read_object(path, "fetch or write it anew")


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a component's folder by PyTorch name, each read when it is asked for.

    bfloat16 arrives as `ml_dtypes.bfloat16`. At any time only what the caller keeps is in memory.
    Variants (model.fp16.safetensors) are the same once more, to be read only where they are alone.

    Attributes:
        headers: of every file, by its name; checked before anything is read.
        index: the index file; None where the tensors are in one file that needs none.
        infos: every tensor's type, shape and place.

    Raises:
        UserError: the folder holds no safetensors (a pickle is refused with the remedy) or more
            than one model, a file is missing, damaged or outside the folder, index and files
            disagree, or a tensor holds NaN.
    """

    def __init__(self, folder: Path):
        self.index, where = _find_files(folder)
        names = sorted(set(where.values())) if self.index else [_only_file(folder).name]
        for name in names:
            check_inside(folder / name, folder)
        self.headers: dict[str, Header] = {name: read_header(folder / name) for name in names}
        self.infos: dict[str, TensorInfo] = {}
        held = [(file, info) for file, header in self.headers.items() for info in header.tensors]
        if self.index:
            _check_against_index(self.index, where, [(info.name, file) for file, info in held])
        self.infos = {info.name: info for _, info in held}

    def __getitem__(self, name: str) -> np.ndarray:
        return read_tensor(self.infos[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)


def _find_files(folder: Path) -> tuple[Path | None, dict[str, str]]:
    """The index and its map from tensor to file; `(None, {})` where one file needs no index."""
    index = _find_index(folder)
    if index is None:
        return None, {}
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise UserError(f"{index} has no weight_map; fetch the folder again")
    strange = sorted({str(file) for file in where.values() if not is_plain_name(file)})
    if strange:
        shown = first_few([name[:200] for name in strange], ", ")
        raise UserError(
            f"{index} names files outside its folder: {shown}; expected plain "
            "names of .safetensors files beside it. Do not trust this folder; fetch it again"
        )
    return index, where


def _find_index(folder: Path) -> Path | None:
    """The plain index; a variant's only where there is no plain file either."""
    indexes = sorted(folder.glob(f"*{INDEX}"))
    plain = [path for path in indexes if not _is_variant(path)]
    files = [path for path in folder.glob("*.safetensors") if not _is_variant(path)]
    # A shard alone is no model, and some variants' index names shards without the variant.
    if not plain and any(not _SHARD.search(path.name) for path in files):
        return None
    indexes = plain or indexes
    if len(indexes) > 1:
        raise UserError(
            f"{folder} holds {len(indexes)} models: {', '.join(path.name for path in indexes)}; "
            "keep one of them, with its files"
        )
    return indexes[0] if indexes else None


def _is_variant(path: Path) -> bool:
    """Whether a file or an index is of model.fp16, say, and not of model."""
    return not path.name.partition(".")[2].startswith("safetensors")


def _model_of(path: Path) -> str:
    """`model` of model.safetensors, model.fp16.safetensors, model-00001-of-00002.fp16... alike."""
    return _SHARD.sub("", path.name).partition(".")[0]


def is_plain_name(file: Any) -> bool:
    """Whether a file that an index names is a safetensors file right beside it."""
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not set(file) & {"/", "\\"}
        and file[0] != "."
        and file.isprintable()  # No NUL, and no half of a character that no file's name has.
        and len(file) < 256
    )


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    if not files and pickles:
        raise pickle_refusal(pickles[0])
    plain = [path for path in files if not _is_variant(path)] if len(files) > 1 else files
    if len(plain) != 1 or len({_model_of(path) for path in files}) > 1:
        raise UserError(
            f"{folder} holds {len(files)} .safetensors files and no index: expected one file "
            "(beside it at most variants such as model.fp16.safetensors), or several with a "
            ".safetensors.index.json; remove what does not belong there, or fetch the folder again"
        )
    return plain[0]


def pickle_refusal(path: Path) -> UserError:
    """Why a pickle is not read, and what to do instead."""
    return UserError(
        f"{path} is a pickle, and reading a pickle runs whatever code its author put there; only "
        "safetensors are read. If you trust it, rewrite it once where PyTorch is installed: "
        'python -c "import torch; from safetensors.torch import save_file; '
        f"save_file(torch.load('{path.name}', map_location='cpu', weights_only=True), "
        f"'{path.with_suffix('.safetensors').name}', metadata={{'format': 'pt'}})\""
    )


def check_inside(path: Path, folder: Path) -> None:
    """See that a file of `folder` is not a link to something elsewhere.

    The hub's cache is such links, from `snapshots/REVISION/` to `blobs/`: those are let through.

    Raises:
        UserError: the file lies outside.
    """
    try:
        real, root = path.resolve(), folder.resolve()
    except (OSError, RuntimeError) as error:  # The latter in Python before 3.13.
        raise UserError(f"{path} is a link that leads nowhere; fetch the file again") from error
    snapshots = [parent for parent in root.parents if parent.name == "snapshots"]
    allowed = [root, *(parent.parent / "blobs" for parent in snapshots)]
    if not any(real.is_relative_to(parent) for parent in allowed):
        raise UserError(
            f"{path} is a link to {real}, outside its folder; put the file itself there if you "
            "trust it"
        )


def _check_against_index(
    index: Path, where: Mapping[str, str], held: list[tuple[str, str]]
) -> None:
    stated, found = set(where.items()), set(held)
    faults = [f"{name} is not in {file}" for name, file in sorted(stated - found)]
    faults += [f"{file} holds {name} unknown to it" for name, file in sorted(found - stated)]
    if faults:
        raise UserError(
            f"{index} and its files disagree: {first_few(faults)}; fetch the folder again"
        )


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes one safetensors file, marked as PyTorch's as transformers demands."""
    # safetensors writes the memory as it lies, whatever the strides say.
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
