"""One run at a time in a workdir."""

import contextlib
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from qvgen_jax import hosts
from qvgen_jax.errors import UserError

LOCK = ".lock"


@contextlib.contextmanager
def alone_in(workdir: Path) -> Iterator[None]:
    """Hold the workdir; the kernel frees it when the process ends, however it ends.

    Of a run of several processes the first holds it for all. A bucket's workdir is held in its
    copy, against runs of this machine only.

    Raises:
        UserError: another run holds it, or it cannot be written to.
    """
    if not hosts.is_first():
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        held = (workdir / LOCK).open("a+")
    except OSError as error:
        raise UserError(
            f"{workdir} cannot be written to ({error.strerror}): give another --workdir, or see "
            "that it may be"
        ) from error
    with held as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "not told"
            raise UserError(
                f"another run is at work in {workdir} ({holder}); wait until it ends, stop it, or "
                "give this one another --workdir"
            ) from error
        except OSError as error:
            # Some network file systems have no locks: no reason not to train there.
            print(f"warning: {workdir} cannot be locked ({error.strerror})", flush=True)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield
