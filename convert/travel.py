"""What goes along with a transformer: the other components, the licence, the model card."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from convert import array_tree
from convert.tensors import INDEX, PICKLES, Tensors, check_inside
from qvgen_jax.errors import UserError

Report = Callable[[int, int], None]
"""Called with the bytes done and the bytes in all."""
CERTIFICATE = "certificate.json"


def silent(done: int, total: int) -> None:
    """A report that nobody reads."""


def companions(source: Path) -> list[Path]:
    """Every file but the transformer's weights, relative to the pipeline folder, sorted.

    LICENSE, NOTICE and README.md are among them wherever they lie. Left behind are hidden files
    (the hub's bookkeeping), pickles and certificates, which speak of this folder only.

    Raises:
        UserError: a file is a link to outside the folder, or a folder a link.
    """
    arrays, found = source / "transformer" / array_tree.ARRAYS, []
    for directory, folders, files in os.walk(source):
        here = Path(directory)
        keep = [name for name in folders if not name.startswith(".") and here / name != arrays]
        folders[:] = keep
        for name in keep:
            if (here / name).is_symlink():
                raise UserError(f"{here / name} is a link; put the folder itself there")
        found += [here / name for name in files if _travels(here.relative_to(source), name)]
    for path in found:
        check_inside(path, source)
    return sorted(path.relative_to(source) for path in found)


def _travels(folder: Path, name: str) -> bool:
    if name.startswith(".") or Path(name).suffix in PICKLES or name == CERTIFICATE:
        return False
    weights = name.endswith((".safetensors", INDEX)) or name == array_tree.MANIFEST
    return not (weights and folder == Path("transformer"))


def copy_companions(source: Path, target: Path) -> None:
    """Copies them; what an earlier, interrupted call copied is kept.

    Raises:
        UserError: see `companions`.
    """
    for path in companions(source):
        origin, copy = source / path, target / path
        if copy.is_file() and _same_stamp(origin, copy):
            continue
        copy.parent.mkdir(parents=True, exist_ok=True)
        partial = copy.with_name(copy.name + ".tmp")
        shutil.copy2(origin, partial)
        partial.replace(copy)


def _same_stamp(one: Path, other: Path) -> bool:
    a, b = one.stat(), other.stat()
    return (a.st_size, a.st_mtime_ns) == (b.st_size, b.st_mtime_ns)


def check_companions(source: Path) -> None:
    """See that what travels along can: by the headers, the weights are whole safetensors files.

    Raises:
        UserError: one is a pickle, damaged, missing a part, or a link to outside the folder.
    """
    companions(source)
    for folder in sorted(path for path in source.iterdir() if path.is_dir()):
        weights = [path for path in folder.glob("*") if path.suffix in (".safetensors", *PICKLES)]
        if weights and folder.name != "transformer":
            Tensors(folder)


def check_target(source: Path, target: Path, compare: str = "") -> None:
    """See that `target` can become a new folder beside `source`.

    Args:
        source: what it will be made from.
        target: the folder.
        compare: what `verify` takes to compare the two; default SOURCE TARGET.

    Raises:
        UserError: it is there already, or one of the two lies in the other.
    """
    one, other = source.resolve(), target.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise UserError(f"{target} and {source} lie in each other; choose another folder")
    if target.exists():
        raise UserError(
            f"{target} exists already; choose another folder, delete it, or compare the two with "
            f"`python -m convert verify {compare or f'{source} {target}'}`"
        )
