"""One process at a time at what several may want to write."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, name: str = "", log: Callable[[str], None] = print) -> Iterator[None]:
    """Hold it as soon as no other process does: who comes second finds what the first made.

    The lock goes with the process that holds it, however that ends.

    Args:
        folder: made if need be.
        name: of what in it is locked, where others may work on the rest.
        log: takes a line where there is something to wait for, or no lock to be had.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another run is at work on {file.name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            # Some network file systems have no locks: no reason not to work there.
            log(f"warning: {file.name} cannot be locked ({error.strerror}); keep other runs out")
        yield
