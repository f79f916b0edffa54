"""When a run's numbers go bad: how it is seen, and what is said of it."""

import statistics
from collections import deque
from collections.abc import Mapping

import jax
import numpy as np

_SPIKE = 4.0  # Times the median of the lines before.
_LINES = 20
_SHOWN = 5


class NotFinite(Exception):
    """So many updates in a row were not finite that the run goes back; holds what is known of it.

    Attributes:
        step: that the run had come to.
        reason: which arrays went bad first, as far as can be told.
    """

    def __init__(self, step: int, reason: str):
        super().__init__(f"step {step}: {reason}")
        self.step, self.reason = step, reason


def check(state: Mapping, finite: jax.Array, most: int) -> None:
    """See that not too many updates in a row were skipped.

    Args:
        state: after the last one.
        finite: of each array of the last gradient, whether it is finite; see `train_step`.
        most: so many may be.

    Raises:
        NotFinite: there were more.
    """
    if int(state["skipped"]["in_a_row"]) > most:
        raise NotFinite(int(state["step"]), diagnosis(state["params"], np.asarray(finite)))


def diagnosis(params: Mapping, finite: np.ndarray) -> str:
    """What is wrong with parameters, or else with their gradients, by name."""
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
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if len(bad) == len(names):
        return "all parameters are finite, the loss is not: the activations overflow"
    if not bad:
        return "parameters and gradients are finite again"
    return f"parameters are finite, the gradients of {_few(bad)} are not"


def _few(words: list[str]) -> str:
    more = f" and {len(words) - _SHOWN} more" if len(words) > _SHOWN else ""
    return ", ".join(words[:_SHOWN]) + more


class Spikes:
    """Tells a loss far above those before it."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=_LINES)

    def told(self, step: int, loss: float) -> str | None:
        """A sentence, or None; call it with every line that is logged."""
        usual = statistics.median(self._last) if len(self._last) == _LINES else None
        if np.isfinite(loss):
            self._last.append(loss)
        if usual is not None and not loss <= _SPIKE * usual:
            return f"step {step}: the loss is {loss:.3g}, the median of {_LINES} lines {usual:.3g}"
        return None
