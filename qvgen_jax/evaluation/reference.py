"""Where the full-precision model's answers are kept: in a run's folder, or shared by many runs."""

import fcntl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def reference_folder(config: Mapping, workdir: Path) -> Path:
    """`evaluate.reference`, or the run's own folder."""
    return Path(config["evaluate"]["reference"] or Path(workdir) / "evaluation")


@contextmanager
def locked(folder: Path, name: str = "") -> Iterator[None]:
    """One process at a time: of several that need the same answer, one computes it.

    The lock goes with the process that holds it, however that ends.

    Args:
        folder: of the answers; made if need be.
        name: of what in it is locked, where others may work on the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An npz file that is there completely or not at all."""
    partial = path.with_suffix(".tmp.npz")
    np.savez(partial, **arrays)
    partial.replace(path)
