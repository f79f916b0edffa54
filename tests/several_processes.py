"""One of several processes of a small training run; `tests/test_hosts.py` starts them.

    DEVICES=2 python -m tests.several_processes WORKDIR STEPS [die-at STEP | stop-at STEP]

Each has DEVICES CPU devices. At the step of `die-at` the last process ends without a word; at that
of `stop-at` all end.
"""

import os
import sys
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", int(os.environ["DEVICES"]))

from qvgen_jax import hosts  # noqa: E402

hosts._SECONDS_SILENT = 20  # A minute is for pods.
hosts.join()

from qvgen_jax.errors import LostProcess, Preempted  # noqa: E402
from qvgen_jax.mesh import mesh_of_config  # noqa: E402
from qvgen_jax.training import loop  # noqa: E402
from tests.training.float64_run import train64  # noqa: E402
from tests.training.test_run import CONFIG, MODEL  # noqa: E402


class Stopped(Exception):
    """Here the run is to end."""


def run(workdir: Path, steps: int, end: str, at: int) -> None:
    config = {
        **CONFIG,
        "quant": {**CONFIG["quant"], "rotation": "hadamard", "smoothing": 0.5},
        "train": {**CONFIG["train"], "steps": steps},
        "mesh": {"data": 1, "fsdp": -1, "context": 0, "tensor": 1, "across_slices": {}},
    }
    enter = loop.enter_step

    def ending(state, step, *others):
        if step == at:
            if end == "stop-at":
                raise Stopped
            if jax.process_index() == jax.process_count() - 1:
                os._exit(1)
        return enter(state, step, *others)

    loop.enter_step = ending
    train64(config, MODEL, workdir, mesh_of_config(config))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    _end, _at = sys.argv[3:] or ("", "-1")
    try:
        run(Path(sys.argv[1]), int(sys.argv[2]), _end, int(_at))
    except Stopped:
        pass
    except Preempted as told:
        print(told, flush=True)
        sys.exit(75)
    except RuntimeError as error:
        lost = error if isinstance(error, LostProcess) else hosts.told(error)
        if lost is None:
            raise
        print(f"error: {lost}", flush=True)
        os._exit(75)
