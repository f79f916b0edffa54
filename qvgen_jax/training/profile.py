"""A profiler's trace of a few steps, for TensorBoard, XProf or Perfetto."""

from pathlib import Path

import jax

_WARM = 2  # Steps after a start that compile, or wait for data.


class Profile:
    """Traces `count` steps once the run is warm; a context manager.

    Args:
        folder: where the trace goes.
        start: the step the run starts from.
        count: how many steps; 0 for none.
    """

    def __init__(self, folder: Path, start: int, count: int):
        self._folder = folder
        self._first, self._end = start + _WARM, start + _WARM + count
        self._open = False

    def __enter__(self) -> "Profile":
        return self

    def before(self, step: int) -> None:
        """Call before every step: opens and closes the trace."""
        if step == self._first < self._end:
            jax.profiler.start_trace(str(self._folder))
            self._open = True
        elif step == self._end:
            self._close()

    def __exit__(self, *exception: object) -> None:
        self._close()

    def _close(self) -> None:
        if self._open:
            jax.profiler.stop_trace()
            self._open = False
