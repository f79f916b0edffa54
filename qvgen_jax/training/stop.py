"""Asked to stop: the step in progress ends, its state is saved, and the program leaves."""

import os
import signal
import threading
from types import FrameType, TracebackType

from qvgen_jax import hosts
from qvgen_jax.errors import Preempted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Listens for SIGTERM and SIGINT; a context manager.

    The first is kept until `asked`, a second one leaves at once. Over several processes JAX's own
    service listens for SIGTERM instead: whichever process gets it, all stop after the same step.
    """

    def __init__(self) -> None:
        self._got: int | None = None
        self._before: dict = {}

    def __enter__(self) -> "Stop":
        # Handlers belong to the main thread; a run in another one is stopped by its owner.
        if hosts.is_alone() and threading.current_thread() is threading.main_thread():
            self._before = {each: signal.signal(each, self._note) for each in _SIGNALS}
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._got is not None:
            os._exit(128 + number)
        self._got = number
        os.write(2, b"\nstopping after this step; once more leaves at once\n")

    def asked(self, step: int) -> bool:
        """Whether to save and leave, on all processes alike; `step` updates are done."""
        if hosts.is_alone():
            return self._got is not None
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        return reached_preemption_sync_point(step)

    def leave(self, step: int) -> None:
        """End the run; its state of `step` is saved.

        Raises:
            Preempted: after SIGTERM.
            KeyboardInterrupt: after SIGINT.
        """
        if self._got == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(f"told to stop; step {step} is saved, and the same command continues there")
