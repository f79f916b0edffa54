"""The processes of a run: found in the environment, told apart, waiting for each other."""

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qvgen_jax.errors import LostProcess, UserError

_MINUTES = 10  # That the others may be behind: one of them may still read its slices.
_meetings = itertools.count()
_SECONDS_SILENT = 60  # After which a process counts as dead.
_ADDRESS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Become one of the processes of a run, if there are several; before anything asks for devices.

    Explicitly, by JAX_COORDINATOR_ADDRESS (`host:port` of the first process), JAX_NUM_PROCESSES and
    JAX_PROCESS_ID; else as Slurm, Open MPI or a Cloud TPU's environment say, where they start
    several.

    Raises:
        UserError: part of the three, or none of them can be reached.
        LostProcess: not all processes came in time.
    """
    how = _explicit(environment)
    if how is None and not _several(environment):
        return
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            **(how or {}),
            initialization_timeout=60 * _MINUTES,
            heartbeat_timeout_seconds=_SECONDS_SILENT,
        )
    except (RuntimeError, ValueError) as error:
        where = f" at {how['coordinator_address']}" if how else ""
        raise LostProcess(
            f"the processes of this run did not find each other{where} within {_MINUTES} minutes "
            f"({_first_line(error)}); start all of them with one address, and see that its port is "
            "open between the hosts"
        ) from error


def _explicit(environment: Mapping[str, str]) -> dict | None:
    given = {name: environment[name] for name in _ADDRESS if environment.get(name)}
    if not given:
        return None
    if len(given) < len(_ADDRESS):
        missing = ", ".join(name for name in _ADDRESS if name not in given)
        raise UserError(
            f"{', '.join(given)} is set and {missing} is not; a run of several processes takes all "
            "three, one process none"
        )
    address, count, index = given.values()
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise UserError(
            f"JAX_NUM_PROCESSES={count} and JAX_PROCESS_ID={index}; expected whole numbers, the "
            "second from 0 to below the first"
        )
    if not address.rpartition(":")[2].isdigit():
        raise UserError(
            f"JAX_COORDINATOR_ADDRESS={address}; expected host:port of the first process, such as "
            "10.0.0.1:8476"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(count),
        "process_id": int(index),
    }


def _several(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows started more than this process."""
    tasks = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
    if any(environment.get(name, "1") not in ("", "1") for name in tasks):
        return True
    workers = environment.get("TPU_WORKER_HOSTNAMES", "")
    if "," in workers or environment.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return True
    # A TPU VM, which asks its own metadata; alone or not, this is right there.
    chips = any(Path(name).exists() for name in ("/dev/accel0", "/dev/vfio/0"))
    return chips and not workers and environment.get("JAX_PLATFORMS", "tpu").startswith("tpu")


def is_first() -> bool:
    """Whether this process speaks for the run: it writes logs, metrics and the report."""
    return jax.process_index() == 0


def is_alone() -> bool:
    """Whether this is the run's only process."""
    return jax.process_count() == 1


def everywhere(tree: Any) -> Any:
    """Arrays that lie in slices over several processes as whole ones in each one's memory."""
    if is_alone():
        return tree
    from jax.experimental.multihost_utils import process_allgather

    return jax.tree.map(lambda leaf: process_allgather(leaf, tiled=True), tree)


def agreed(here: bool) -> bool:
    """Whether it is so on every process of the run."""
    if is_alone():
        return here
    from jax.experimental.multihost_utils import process_allgather

    return bool(process_allgather(np.asarray(here)).all())


def share(folder: Path) -> bool:
    """Whether every process of the run sees what the first one writes to a folder."""
    if is_alone():
        return True
    from jax.experimental.multihost_utils import broadcast_one_to_all

    number = int(broadcast_one_to_all(np.int32(int.from_bytes(os.urandom(3)))))
    token = folder / f".seen-{number}"
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    barrier(f"{folder} is looked at ({number})")
    seen = agreed(token.exists())
    if is_first():
        token.unlink()
    return seen


def barrier(name: str, minutes: float = _MINUTES) -> None:
    """Wait for every process of the run.

    Raises:
        LostProcess: some did not come in time; the message says which.
    """
    if is_alone():
        return
    from jax._src.distributed import global_state  # What orbax waits with too; there is no other.

    try:
        # A name is good for one meeting; all processes come to the same ones in the same order.
        key = f"qvgen_jax {next(_meetings)} {name}"
        global_state.client.wait_at_barrier(key, int(minutes * 60_000))
    except jax.errors.JaxRuntimeError as error:
        raise LostProcess(
            f"not all processes reached {name!r} within {minutes:g} minutes: {_first_line(error)}"
        ) from error


def told(error: Exception) -> LostProcess | None:
    """What an error of a computation over several processes means, if it means that one is gone.

    Where no computation fails, JAX's own service ends the process after `_SECONDS_SILENT`, by an
    abort that says which task died.
    """
    if is_alone() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    return LostProcess(
        f"process {jax.process_index()} of {jax.process_count()} cannot go on without the others: "
        f"{_first_line(error)}; start all of them again with the same command, and the run goes on "
        "from its last checkpoint"
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:400]
