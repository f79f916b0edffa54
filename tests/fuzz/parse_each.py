"""Reads command lines, one JSON list a line, and answers what becomes of each, in a process of its
own: the program's flags can be parsed only once in a process."""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

from qvgen_jax.command_line import parse
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import sizes_of_config
from qvgen_jax.models import config_from_file
from qvgen_jax.training.check import check_config
from qvgen_jax.training.loop import rank_decay
from qvgen_jax.training.student import quant_config

HELP = "what --help prints, and nothing else"
SECONDS = 20  # Of one command line; on a busy machine, too.


def outcome(arguments: list[str]) -> dict:
    """`refused` with the message, `config` as repr by dotted key, or `crashed`."""
    sys.argv = ["main.py", *arguments]  # Where ml_collections looks for overrides.
    try:
        config = parse(sys.argv).to_dict()
        if "train" not in config:
            raise UserError("no training config; main.py says so for each job")
        check_config(config)
        model = Path(config["model"]) / "transformer/config.json"
        if model.is_file():
            quant_config(config["quant"], config_from_file(model))
        rank_decay(config)
        sizes_of_config(config, 1)
    except UserError as error:
        return {"refused": str(error)}
    except SystemExit as exit:
        return {"crashed": f"exit code {exit.code}"} if exit.code else {"refused": HELP}
    except BaseException:
        return {"crashed": traceback.format_exc()}
    return {"config": dict(flat(config))}


def flat(config: dict, prefix: str = ""):
    for key, value in config.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, repr(value)


def answer(arguments: list[str]) -> dict:
    read, write = os.pipe()
    if not (child := os.fork()):
        signal.alarm(SECONDS)
        sys.stdout = sys.stderr  # The other is for the answers.
        with os.fdopen(write, "w") as pipe:
            json.dump(outcome(arguments), pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return json.loads(said) if not status else {"crashed": f"hung or killed, status {status}"}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
