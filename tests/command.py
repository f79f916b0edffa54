"""`main.py` in a process forked from one that has imported everything: seconds saved at each start.

Nothing has asked JAX for its devices before the fork, so every process is as new.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
_MINUTE = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")
# What `main.run` imports when a job is asked for.
_CONTEXT.set_forkserver_preload(
    [
        "main",
        "convert.export",
        "qvgen_jax.evaluation.evaluate_job",
        "qvgen_jax.evaluation.finish",
        "qvgen_jax.evaluation.validate",
        "qvgen_jax.plan.job",
        "qvgen_jax.serve.job",
        "qvgen_jax.training.pretrain",
        "qvgen_jax.training.run",
    ]
)


def run_main(*arguments: str) -> subprocess.CompletedProcess:
    """Runs `python main.py` with arguments that are refused in seconds; text of both outputs.

    Raises:
        TimeoutError: it goes on for longer than ten minutes.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = _CONTEXT.Process(target=_run, args=(folder, arguments))
        process.start()
        process.join(10 * _MINUTE)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(f"main.py {' '.join(arguments)} does not end")
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
        return subprocess.CompletedProcess(arguments, process.exitcode, out, err)


def _run(folder: str, arguments: tuple[str, ...]) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(folder) / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.chdir(ROOT)
    sys.argv = ["main.py", *arguments]
    import main

    try:
        sys.exit(main.main(sys.argv))
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
