"""The scan: every layer of every block alone, at each candidate's bits."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import numpy as np

from qvgen_jax.errors import UserError
from qvgen_jax.mixed.candidates import Candidate
from qvgen_jax.mixed.probe import Probe
from qvgen_jax.mixed.sensitivity import Sensitivity, write_sensitivity
from qvgen_jax.quant.blocks import in_block, is_stacked
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.switched import switched_off, switched_on, switched_params

_SECONDS = 10.0  # Between two lines of progress; what was measured is written then.


def layer_targets(names: Iterable[str], blocks: int) -> dict[str, tuple[str, int | None]]:
    """Every layer's own name to its stacked name and its block, the blocks in their order."""
    names = tuple(names)
    outside = {name: (name, None) for name in names if not is_stacked(name)}
    inside = {
        in_block(name, block): (name, block)
        for block in range(blocks)
        for name in names
        if is_stacked(name)
    }
    return outside | inside


def scan(
    found: Sensitivity,
    path: Path,
    probe: Probe,
    teacher: dict,
    quant: QuantConfig,
    blocks: int,
    activations: Mapping[str, jax.Array] | None = None,
    log: Callable[[str], None] = print,
) -> Sensitivity:
    """Measures what is missing, and writes it as it goes; stopped, it goes on from there.

    Args:
        found: what is known.
        path: of the file.
        probe: of the network.
        teacher: its parameters in full precision.
        quant: everything but bits.
        blocks: of the model.
        activations: see `switched_params`.
        log: takes a line of progress.

    Raises:
        UserError: a layer's damage is no number; what was measured before is written.
    """
    targets = layer_targets(probe.names, blocks)
    progress = _Progress(log)
    try:
        for candidate in found.candidates:
            rows = found.damage.setdefault(candidate.name, {})
            asked = [name for name in found.layers if name not in rows]
            if not asked:
                continue
            params, on = switched_params(teacher, probe.names, at(quant, candidate), activations)
            off = switched_off(on, probe.names)
            for name in asked:
                levels = switched_on(off, *targets[name], tuple(candidate))
                damage = probe.damage(params, levels)
                _check_finite(damage, name, candidate)
                rows[name] = [float(f"{x:.6g}") for x in damage]
                if progress.made_one(f"{candidate.name} {name}", found.missing):
                    write_sensitivity(path, found)
            del params  # Before the next ones, which may have kernels of their own in float32.
    finally:
        write_sensitivity(path, found)
    return found


def _check_finite(damage: np.ndarray, name: str, candidate: Candidate) -> None:
    if not np.isfinite(damage).all():
        raise UserError(
            f"the damage of {name} at {candidate.name} is {damage.tolist()}, expected finite "
            "numbers: see that the model's weights are, or scan with "
            "--config.compute_dtype=float32"
        )


class _Progress:
    """Lines of what is being measured, and of the time that is left."""

    def __init__(self, log: Callable[[str], None]):
        self._log, self._made = log, -1  # The first measurement compiles, and is not counted.
        self._begin = self._told = time.monotonic()

    def made_one(self, what: str, missing: int) -> bool:
        """Counts; whether a line was due."""
        self._made += 1
        now = time.monotonic()
        if not self._made:
            self._begin = now
        if not self._made or now - self._told < _SECONDS:
            return False
        self._told = now
        left = (now - self._begin) / self._made * missing
        self._log(f"sensitivity: {what}; {int(left) // 60}:{int(left) % 60:02d} left")
        return True


def at(quant: QuantConfig, candidate: Candidate) -> QuantConfig:
    """The config with these bits everywhere; an operand that stays as it is gets any."""
    weights, activations = (bits or 8 for bits in candidate)
    return dataclasses.replace(quant, weight_bits=weights, act_bits=activations, bits={})
