"""One run per file. Each builds a locked ConfigDict; they import ml_collections only."""

import importlib.util
from pathlib import Path

from ml_collections import ConfigDict


def read_config(argument: str) -> ConfigDict:
    """The config of `file.py[:argument]`.

    Raises:
        ValueError: there is no such file, it is no config, or it does not know the argument.
    """
    path, _, argument = argument.partition(":")
    if not Path(path).is_file():
        raise ValueError(
            f"config file {path!r} does not exist; run from the repository's root "
            "and name one of configs/*.py"
        )
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None:
        raise ValueError(f"{path!r} is no Python file; name one of configs/*.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{path!r} does not run: {type(error).__name__}: {error}") from error
    if not hasattr(module, "get_config"):
        raise ValueError(f"{path!r} has no get_config, so is no config; name one of configs/*.py")
    return module.get_config(argument)
