"""`--job plan`: a config and the name of a target to a report."""

import json
from collections.abc import Mapping
from pathlib import Path

from qvgen_jax.errors import UserError
from qvgen_jax.plan.plan import make_plan
from qvgen_jax.plan.target import parse_target
from qvgen_jax.plan.text import as_json, as_text
from qvgen_jax.plan.verdict import verdict


def run_plan(
    config: Mapping, target: str = "", compiler: bool = True, file: str | None = None
) -> str:
    """The report, as text.

    Args:
        config: of a training run, plain dicts.
        target: see `parse_target`.
        compiler: whether to ask the target's compiler.
        file: where the same goes as JSON.

    Raises:
        UserError: a wrong config or target, a mesh that does not divide, a file that cannot be
            written.
    """
    plan = make_plan(config, parse_target(target), compiler=compiler)
    said = verdict(plan)
    if file:
        try:
            Path(file).write_text(json.dumps(as_json(plan, said), indent=1) + "\n")
        except OSError as error:
            raise UserError(f"--plan_json={file} cannot be written ({error.strerror})") from error
    return as_text(plan, said)
