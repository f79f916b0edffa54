"""The file of a scan, `sensitivity.json`: what was asked, and the damage of every layer alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.mixed.candidates import Candidate, parse_candidates

NAME = "sensitivity.json"
_VERSION = 1
_REMEDY = "delete it and scan again with --job sensitivity"


class Sensitivity(NamedTuple):
    """A scan.

    Attributes:
        asked: what decides its numbers: model, quantizers, clips, timesteps.
        candidates: that were asked for.
        layers: names of all quantized linears, block by block, in the order of the scan.
        damage: candidate's name to layer's name to the damage at each of `asked["timesteps"]`.
    """

    asked: Mapping[str, Any]
    candidates: tuple[Candidate, ...]
    layers: tuple[str, ...]
    damage: dict[str, dict[str, list[float]]]

    @property
    def timesteps(self) -> list[int]:
        return self.asked["timesteps"]

    @property
    def missing(self) -> int:
        """How many measurements there are still to make."""
        return len(self.candidates) * len(self.layers) - sum(map(len, self.damage.values()))

    def of(self, candidate: Candidate) -> np.ndarray:
        """Its damage, float64 `[layers, timesteps]`.

        Raises:
            UserError: the scan is not complete.
        """
        rows = self.damage.get(candidate.name, {})
        if any(name not in rows for name in self.layers):
            raise UserError(
                f"the scan has {len(rows)} of {len(self.layers)} layers at {candidate.name}; "
                "continue it with --job sensitivity"
            )
        return np.array([rows[name] for name in self.layers])


def write_sensitivity(path: Path, found: Sensitivity) -> None:
    """Writes the file, whole."""
    write_json(
        path,
        {
            "version": _VERSION,
            "asked": dict(found.asked),
            "candidates": ",".join(each.name for each in found.candidates),
            "layers": list(found.layers),
            "damage": found.damage,
        },
    )


def read_sensitivity(path: Path) -> Sensitivity:
    """The scan in a file.

    Raises:
        UserError: it is missing, damaged, or of another version.
    """
    if not path.is_file():
        raise UserError(f"{path} is not there; --job sensitivity with this --workdir makes it")
    fields = read_object(path, _REMEDY)
    try:
        if fields["version"] != _VERSION:
            raise ValueError(f"version {fields['version']!r}, expected {_VERSION}")
        found = Sensitivity(
            fields["asked"],
            parse_candidates(fields["candidates"]),
            tuple(fields["layers"]),
            {name: dict(rows) for name, rows in fields["damage"].items()},
        )
        _check(found)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{path} is no complete scan of this program ({error}); {_REMEDY}"
        ) from error
    return found


def _check(found: Sensitivity) -> None:
    clips, timesteps = found.asked["clips"], found.timesteps
    if type(clips) is not int or clips < 1:
        raise ValueError(f"clips={clips!r}, expected a whole number")
    if not (isinstance(timesteps, list) and timesteps and all(type(t) is int for t in timesteps)):
        raise ValueError(f"timesteps={timesteps!r}, expected a list of whole numbers")
    for rows in found.damage.values():
        for name, row in rows.items():
            if len(row) != len(timesteps):
                raise ValueError(f"{name} has {len(row)} damages for {len(timesteps)} timesteps")
            if not all(math.isfinite(value) and value >= 0 for value in row):
                raise ValueError(f"{name} has damages {row}, expected finite ones of 0 or more")


def begun(path: Path, asked: Mapping, candidates: Sequence[Candidate], layers: Sequence[str]):
    """A new scan, or the one in the file where that asked the same; then with what it measured.

    Candidates may be added: what is known of others stays.

    Raises:
        UserError: the file holds a scan that asked something else.
    """
    new = Sensitivity(dict(asked), tuple(candidates), tuple(layers), {})
    if not path.is_file():
        return new
    old = read_sensitivity(path)
    changed = [key for key in asked if old.asked.get(key) != asked[key]]
    if changed or old.layers != new.layers:
        what = ", ".join(f"{k} {old.asked.get(k)!r}, now {asked[k]!r}" for k in changed) or "layers"
        raise UserError(
            f"{path} holds a scan that asked something else ({what}); move it away, or give "
            "another --workdir"
        )
    both = tuple(dict.fromkeys((*old.candidates, *new.candidates)))
    return old._replace(candidates=both)


def as_table(found: Sensitivity, most: int = 12) -> str:
    """The most sensitive layers and the kinds of layers, in per cent of the prediction's norm."""
    shown = [each for each in found.candidates if len(found.damage.get(each.name, ())) > 0]
    means = {each: found.of(each).mean(1) for each in shown}
    order = np.argsort(-means[shown[0]])[:most]
    head = f"{'relative error of the prediction, %':46s}" + "".join(f"{e.name:>9s}" for e in shown)
    lines = [head, *(_line(found.layers[i], [means[e][i] for e in shown]) for i in order)]
    total = [means[e].sum() for e in shown]
    return "\n".join([*lines, _line(f"all {len(found.layers)}, if squares add up", total)])


def _line(name: str, damages: Sequence[float]) -> str:
    return f"{name:46s}" + "".join(f"{100 * value**0.5:9.3g}" for value in damages)
