"""When a run's numbers go bad: how it is seen, and what is said of it."""

import statistics
from collections import deque
from collections.abc import Mapping

import jax
import numpy as np

_SPIKE = 4.0  # Times the median of the lines before.
_LINES = 20
_STILL = 0.5  # Of the teacher's variance over frames.
_STILL_LINES = 3  # In a row: a batch of clips at full noise differs by chance.
_SHOWN = 5


class NotFinite(Exception):
    """So many updates in a row were not finite that the run goes back; holds what is known of it.

    Attributes:
        order: the state's, see `qvgen_jax.training.state`.
    """

    def __init__(self, step: int, reason: str, order: int):
        super().__init__(f"step {step}: {reason}")
        self.order = order


def check(state: Mapping, metrics: Mapping, most: int) -> None:
    """See that not too many updates in a row were skipped.

    Args:
        state: after the last one.
        metrics: of the last one: `loss`, and `finite` of each array of the gradient.
        most: so many may be.

    Raises:
        NotFinite: there were more.
    """
    if int(state["skipped"]["in_a_row"]) > most:
        reason = diagnosis(state["params"], float(metrics["loss"]), np.asarray(metrics["finite"]))
        raise NotFinite(int(state["step"]), reason, int(state["order"]))


def diagnosis(params: Mapping, loss: float, finite: np.ndarray) -> str:
    """What is wrong with parameters, or else with loss or gradients, by name."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [".".join(part.key for part in path) for path, _ in leaves]
    wrong = []
    for name, (_, leaf) in zip(names, leaves, strict=True):
        if not bool(np.isfinite(leaf).all()):
            wrong.append(f"{name} is not finite")
        elif name.endswith(".scale") and "norm" not in name and float(np.min(leaf)) <= 0:
            wrong.append(f"{name} has a scale of {float(np.min(leaf)):.3g}")
    if wrong:
        return _few(wrong)
    if not np.isfinite(loss):
        return "all parameters are finite, the loss is not: clips that are not, or activations"
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if not bad:
        return "parameters, loss and gradients are finite again"
    return f"parameters and loss are finite, the gradients of {_few(bad)} are not"


def _few(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


class Alarms:
    """Tells a loss far above those before it, and a student whose videos stand still."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_LINES)
        self._still = 0

    def told(self, loss: float, motion: float) -> list[str]:
        """Sentences; call it with every line that is logged.

        Args:
            loss: of the step.
            motion: the student's by the teacher's.
        """
        told = []
        usual = statistics.median(self._last) if len(self._last) == _LINES else None
        if np.isfinite(loss):
            self._last.append(loss)
        if usual is not None and not loss <= _SPIKE * usual:
            told.append(f"the loss is {loss:.3g}, the median of {_LINES} lines before {usual:.3g}")
        self._still = self._still + 1 if motion < _STILL else 0
        if self._still == _STILL_LINES:
            told.append(
                f"the student's prediction changes over frames {motion:.2f} times as much as the "
                f"teacher's, below {_STILL} for {_STILL_LINES} lines: its videos will stand still"
            )
        return told
