"""Whether a plan fits, and if not, which one change makes it fit."""

import copy
from collections.abc import Iterable, Iterator, Mapping

from qvgen_jax.errors import UserError
from qvgen_jax.mesh import sizes_of_config
from qvgen_jax.models.remat import POLICIES
from qvgen_jax.plan import ahead
from qvgen_jax.plan.memory import estimate
from qvgen_jax.plan.plan import SPARE, Plan
from qvgen_jax.plan.shapes import read_run
from qvgen_jax.plan.target import Target

_TIMES = (2, 4, 8, 16, 32, 64)
_MOST_CHIPS = 4096


def verdict(plan: Plan) -> str:
    """One or two sentences."""
    if plan.fits is None:
        return (
            f"needs {_gb(plan.need)} of memory a device; {plan.target.chip.name} has no size in a "
            "data sheet to compare with"
        )
    limit = f"{_gb((1 - SPARE) * plan.target.memory)} (10 % of {_gb(plan.target.memory)} spared)"
    source = "as compiled" if isinstance(plan.compiled, ahead.Compiled) else "as estimated"
    if plan.fits:
        return f"fits: {_gb(plan.need)} of {limit}, {source}.{_could_keep(plan)}"
    refused = isinstance(plan.compiled, ahead.Refused)
    need = "the compiler refused it" if refused else f"{_gb(plan.need)} of {limit}, {source}"
    changes = _changes(plan)
    if not changes:
        return f"does not fit: {need}. No single change here makes it fit; take larger chips."
    return "\n  ".join([f"does not fit: {need}. Estimated to fit with one of", *changes])


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _could_keep(plan: Plan) -> str:
    """Whether a policy that recomputes less fits as well."""
    if plan.run.config["train"]["remat"] != "blocks":
        return ""
    config = copy.deepcopy(dict(plan.run.config))
    config["train"] = {**config["train"], "remat": "attention"}
    need = plan.need + _need(config, plan.target) - plan.memory.peak
    if need > (1 - SPARE) * plan.target.memory:
        return ""
    return (
        f" There is room for --config.train.remat=attention: {_gb(need)}, and self-attention is "
        "not computed again."
    )


def _changes(plan: Plan) -> list[str]:
    """Of each kind of change the smallest with which the estimate fits."""
    found = []
    for kind in _alternatives(plan):
        for name, config, target in kind:
            try:
                need = _need(config, target)
            except UserError:  # A size that does not divide is no remedy.
                continue
            if need <= (1 - SPARE) * target.memory and need < plan.memory.peak:
                found.append(f"{name}: {_gb(need)} of {_gb(target.memory)}")
                break
    return found


def _alternatives(plan: Plan) -> Iterator[Iterator[tuple[str, dict, Target]]]:
    """Kinds of changes, of each the smaller ones first."""
    config, target = plan.run.config, plan.target

    def overridden(section: str, key: str, values: Iterable) -> Iterator:
        for value in values:
            changed = copy.deepcopy(dict(config))
            changed[section] = {**changed.get(section, {}), key: value}
            yield f"--config.{section}.{key}={value}", changed, target

    yield overridden("train", "remat", POLICIES)
    if config["train"]["target"] == "teacher":
        yield overridden("train", "teacher_weights", ["int8"])
    for section, key, now in (
        ("train", "accumulate", config["train"]["accumulate"]),
        ("mesh", "context", plan.sizes["context"]),
    ):
        yield overridden(section, key, [times * now for times in _TIMES])
    yield _larger(config, target)


def _larger(config: Mapping, target: Target) -> Iterator[tuple[str, Mapping, Target]]:
    larger = target.grown()
    while larger and larger.chips <= _MOST_CHIPS:
        yield f"--target={larger.name}", config, larger
        larger = larger.grown()


def _need(config: Mapping, target: Target) -> int:
    sizes = sizes_of_config(config, target.devices)
    return estimate(read_run(config), sizes, target.chip.platform).peak
