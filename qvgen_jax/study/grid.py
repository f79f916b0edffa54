"""The cells of a study: which runs there are, with which overrides, as which commands."""

import difflib
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import read_config
from qvgen_jax.errors import UserError
from qvgen_jax.quant.bits_file import with_bits_file
from qvgen_jax.study.operations import EQUAL_OPERATIONS, equal_steps

# Keys that change where things lie, what is kept or what is written about a run, not its numbers.
_FREE = (
    "calibration.batch_size",
    "calibration.branch_iterations",
    "calibration.by_activity",
    "calibration.count",
    "calibration.damping",
    "calibration.every",
    "calibration.exponent",
    "calibration.prompts",
    "calibration.rank",
    "calibration.rounding",
    "calibration.rows",
    "calibration.smoothing_points",
    "calibration.steps",
    "command",
    "data.encoded",
    "data.most_refused",
    "data.skip_unusable",  # What that was before.
    "evaluate.held_out_encoded",
    "evaluate.pixels",
    "evaluate.reference",
    "evaluate.shown",
    "kernels",
    "method",  # A name.
    "sample.count",
    "train.checkpoint_every",
    "train.fresh_orders",
    "train.hang_minutes",
    "train.keep_checkpoints",
    "train.log_every",
    "train.log_spectrum",
    "train.most_skipped",
    "train.remat",
    "train.validate_every",
    "train.validate_videos",
    "train.wandb_project",
)


class Cell(NamedTuple):
    """One run of a study.

    Attributes:
        stage: such as "screening".
        variant: its name in the grid.
        bits: of weights and activations.
        seed: of the run.
        base: the config file it starts from, with its argument.
        overrides: dotted key -> value, everything that differs from the base.
        config: the whole config that results, plain dicts.
    """

    stage: str
    variant: str
    bits: tuple[int, int]
    seed: int
    base: str
    overrides: dict[str, Any]
    config: dict

    @property
    def name(self) -> str:
        return f"{self.variant}-{bits_name(self.bits)}-{self.seed}"

    def command(self, workdir: Path) -> list[str]:
        """The arguments after `python` of a normal run that is this cell."""
        given = [f"--config.{key}={value}" for key, value in self.overrides.items()]
        return ["main.py", "--config", self.base, *given, "--workdir", str(workdir)]


def bits_name(bits: Sequence[int]) -> str:
    """`w4a4`."""
    return f"w{bits[0]}a{bits[1]}"


def read_cells(grid: Mapping, variants: Sequence[str]) -> list[Cell]:
    """All cells of a grid, in the order in which they run.

    All variants at the first bit-width come first: a variant's next bit-width then finds its
    programs compiled, since bits are data to them.

    Args:
        grid: reads `stage`, `base`, `common`, `bits`, `seeds`, `more_seeds`, `variants`.
        variants: names of those to run.

    Raises:
        UserError: an unknown variant or key, or a value of another type than the base's.
    """
    for name in variants:
        if name not in grid["variants"]:
            raise UserError(f"the grid has no variant {name!r}{_nearest(name, grid['variants'])}")
    rounds = [(seed, variants) for seed in grid["seeds"]]
    for seed in sorted({seed for seeds in grid["more_seeds"].values() for seed in seeds}):
        rounds.append((seed, [v for v in variants if seed in grid["more_seeds"].get(v, ())]))
    return [
        _cell(grid, variant, bits, seed)
        for seed, some in rounds
        for bits in grid["bits"]
        for variant in some
    ]


def _cell(grid: Mapping, variant: str, bits: tuple[int, int], seed: int) -> Cell:
    overrides = {
        **grid["common"],
        "quant.weight_bits": bits[0],
        "quant.act_bits": bits[1],
        "seed": seed,
        **grid["variants"][variant],
    }
    if overrides.get("train.steps") == EQUAL_OPERATIONS:
        like = _resolve(grid["base"], {**overrides, **_unchanged(grid)}, variant)
        alone = _resolve(grid["base"], {**overrides, **_length(grid["common"])}, variant)
        steps = equal_steps(alone, like)
        warmup = round(steps * like["train"]["warmup_steps"] / like["train"]["steps"])
        overrides |= {"train.steps": steps, "train.warmup_steps": warmup}
    config = _resolve(grid["base"], overrides, variant)
    return Cell(grid["stage"], variant, tuple(bits), seed, grid["base"], overrides, config)


def _length(common: Mapping) -> dict:
    return {key: common[key] for key in ("train.steps", "train.warmup_steps")}


def _unchanged(grid: Mapping) -> dict:
    """Overrides that bring a variant back to the grid's default."""
    rank = grid["common"].get("quant.rank", load_base(grid["base"]).quant.rank)
    return {**_length(grid["common"]), "quant.rank": rank}


def load_base(base: str) -> ConfigDict:
    """The config of `file.py[:argument]`.

    Raises:
        UserError: there is no such file, it is no config, or it does not know the argument.
    """
    try:
        return read_config(base)
    except ValueError as error:
        raise UserError(f"the grid's base {base!r}: {error}") from error


def _resolve(base: str, overrides: Mapping[str, Any], variant: str) -> dict:
    config = load_base(base)
    for key, value in overrides.items():
        node, (*sections, leaf) = config, key.split(".")
        for section in sections:
            node = node.get(section, ConfigDict()) if isinstance(node, ConfigDict) else {}
        if leaf not in node:
            known = [name for name, _ in _flat(config.to_dict())]
            raise UserError(f"variant {variant!r}: {base} has no key {key!r}{_nearest(key, known)}")
        try:
            node[leaf] = value
        except (TypeError, ValueError) as error:
            raise UserError(f"variant {variant!r}, {key}={value!r}: {error}") from error
    return with_bits_file(config.to_dict())


def _nearest(name: str, known: Sequence[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else f"; there are {', '.join(sorted(known))}"


def _flat(config: Mapping, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{key}.")
        else:
            found.append((f"{prefix}{key}", value))
    return found


def relevant(config: Mapping) -> dict[str, Any]:
    """Dotted key -> value of everything that decides a run's numbers, as JSON would give it."""
    flat = {key: value for key, value in _flat(config) if key not in _FREE}
    return json.loads(json.dumps(flat, sort_keys=True))


def digest(config: Mapping) -> str:
    """Of `relevant(config)`: 12 hexadecimal digits."""
    return hashlib.sha256(json.dumps(relevant(config)).encode()).hexdigest()[:12]


def differences(recorded: Mapping[str, Any], cell: Cell) -> list[str]:
    """What a cell asks for that the `relevant` config of a recorded run did not have.

    A key that the record does not know was added to the base later; with its default the run is
    still the same one, and only an override of it is a difference.
    """
    now = relevant(cell.config)
    found = []
    for key in sorted((set(recorded) | set(now)) - set(_FREE)):
        if key not in recorded:
            if key in cell.overrides:
                found.append(f"{key}: new, {now[key]!r} here")
        elif recorded[key] != now.get(key):
            found.append(f"{key}: {recorded[key]!r} there, {now.get(key)!r} here")
    return found


def shown_command(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """A command as one types it, its environment in front."""
    variables = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
    return " ".join([*variables, "python", shlex.join(command)])
