"""Which checkpoint is the best by validation; `best.json` in the workdir remembers.

Only students without a branch compete: no other ships.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from qvgen_jax import hosts
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.training.checkpoint import Checkpoints

FILE = "best.json"


def read_best(workdir: Path) -> dict | None:
    """`step` and `held_out_loss` of the best so far; None before the first.

    Raises:
        UserError: the file is damaged.
    """
    path = workdir / FILE
    if not path.is_file():
        return None
    remedy = "delete it: the next validation writes it anew"
    best = read_object(path, remedy)
    if type(best.get("step")) is not int or not isinstance(best.get("held_out_loss"), float):
        raise UserError(f"{path} holds no step and held_out_loss; {remedy}")
    return best


def is_better(workdir: Path, loss: float) -> bool:
    """Whether no loss so far was as low."""
    best = read_best(workdir)
    return math.isfinite(loss) and (best is None or loss < best["held_out_loss"])


def keep_best(workdir: Path, checkpoints: Checkpoints, state: Mapping, loss: float) -> None:
    """Save the state as the best one, whole, before it is called that: a crash between leaves the
    one before."""
    step, before = int(state["step"]), read_best(workdir)
    checkpoints.keep(step, instead_of=before and before["step"])
    checkpoints.save(state)
    checkpoints.finish()
    if hosts.is_first():
        write_json(workdir / FILE, {"step": step, "held_out_loss": loss})
