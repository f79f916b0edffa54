"""Where the full-precision model's answers are kept: in a run's folder, or shared by many runs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np


def reference_folder(config: Mapping, workdir: Path) -> Path:
    """`evaluate.reference`, or the run's own folder."""
    return Path(config["evaluate"]["reference"] or Path(workdir) / "evaluation")


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """An npz file that is there completely or not at all."""
    partial = path.with_suffix(".tmp.npz")
    np.savez(partial, **arrays)
    partial.replace(path)
