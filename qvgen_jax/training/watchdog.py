"""Ends a run whose step never does: a lost peer, a loader that is stuck, a compiler in a loop."""

import faulthandler
import sys
from types import TracebackType


class Watchdog:
    """After so many minutes without `fed`, all stacks are printed and the process ends with 1.

    A context manager. It does not need Python to run: the interpreter's own timer watches.

    Args:
        minutes: longer than any step takes, the first of which compiles; 0 does not watch.
    """

    def __init__(self, minutes: float):
        self._seconds = 60 * minutes

    def __enter__(self) -> "Watchdog":
        self.fed()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        faulthandler.cancel_dump_traceback_later()

    def fed(self) -> None:
        """A step is done: the time begins anew."""
        if self._seconds:
            faulthandler.dump_traceback_later(self._seconds, exit=True, file=sys.__stderr__)
