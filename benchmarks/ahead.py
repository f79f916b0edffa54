"""Real training steps and inference compiled for chips that are not here, beside the estimates.

    python benchmarks/ahead.py                       # rows that are not there yet, minutes each
    python benchmarks/ahead.py --rows wan14b --again # those whose name has it, anew
    python benchmarks/ahead.py --write docs/pods.md  # the table, between the file's markers

Needs the extra `aot`. What compilers said is kept in benchmarks/results/ahead.json; the estimates
beside it are made anew for each table.
"""

import argparse
import copy
import json
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from configs import read_config
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import sizes_of_config, sizes_to_generate
from qvgen_jax.plan import ahead
from qvgen_jax.plan.memory import Memory, estimate
from qvgen_jax.plan.shapes import read_run
from qvgen_jax.plan.target import parse_target

RESULTS = Path(__file__).with_name("results") / "ahead.json"
BEGIN, END = "<!-- ahead: begin -->", "<!-- ahead: end -->"


# What stands in a row's name for its program.
_NAMES = {"step": (), "measuring": ("measuring",), "forward": ("inference",)}


class Row(NamedTuple):
    """One program to compile.

    Attributes:
        config: the file's name without its ending.
        target: of `--target`.
        overrides: dotted keys of the config and their values.
        fitted: whether the estimate's factors were fitted to it.
        program: "step"; "measuring" of the teacher before it, or "forward" of the packed model, for
            which there is no estimate.
    """

    config: str
    target: str
    overrides: Mapping[str, object] = {}
    fitted: bool = False
    program: str = "step"

    @property
    def name(self) -> str:
        """Its key in the results."""
        changed = [f"{key.rpartition('.')[2]}={value}" for key, value in self.overrides.items()]
        return " ".join([self.config, *_NAMES[self.program], self.target, *changed])

    def read(self) -> dict:
        """The config with the overrides, plain dicts."""
        config = copy.deepcopy(read_config(f"configs/{self.config}.py").to_dict())
        for key, value in self.overrides.items():
            *sections, leaf = key.split(".")
            place = config
            for section in sections:
                place = place.setdefault(section, {})
            place[leaf] = value
        return config


ROWS = (
    Row("wan14b_w4a4", "v5p:4x4x4"),
    Row("wan14b_w4a4", "v6e:16x16", fitted=True),
    Row("wan14b_w4a4", "v6e:16x16", program="measuring"),
    Row("wan14b_w4a4", "2xv5p:4x4x4", {"mesh.across_slices.data": 2, "train.batch_size": 128}),
    Row("wan1_3b_w4a4", "v5e:8x8"),
    Row("cogvideox2b_w4a4", "v5e:8x8"),
    Row(
        "wan14b_w4a4",
        "v6e:2x2",
        {"data.num_frames": 81, "data.height": 720, "data.width": 1280},
        program="forward",
    ),
)


def compile_rows(rows: Sequence[Row], results: dict, again: bool) -> None:
    """Compile what is missing, and write down each as soon as it is there."""
    for row in rows:
        if row.name in results and not again:
            continue
        print(f"{row.name} ...", flush=True)
        config, target = row.read(), parse_target(row.target)
        if row.program == "forward":
            sizes = sizes_to_generate(target.devices)
        else:
            sizes = sizes_of_config(config, target.devices)
        found = ahead.compile_step(config, target, sizes, program=row.program)
        if isinstance(found, ahead.Compiled):
            found = found._replace(collectives=[c._asdict() for c in found.collectives])
        package = "libtpu" if target.chip.platform == "tpu" else "jax-cuda13-plugin"
        made_by = {name: version(name) for name in ("jax", package)}
        results[row.name] = {"mesh": sizes, "made_by": made_by, **found._asdict()}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print(line(row, results[row.name]), flush=True)


HEAD = """\
| step | mesh | arguments | estimate | temporaries | estimate | laid out | of | compiled in |
|---|---|---|---|---|---|---|---|---|"""


def line(row: Row, found: Mapping) -> str:
    """The row of the table: gigabytes of a device, and seconds."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in found["mesh"].items() if n > 1)
    guess = estimated(row) if row.program == "step" else None
    expected, made = (_gb(guess.arguments), _gb(guess.made)) if guess else ("", "")
    memory = parse_target(row.target).memory / 1e9
    if "reason" in found:
        return f"| {row.name} | {mesh} | | {expected} | | {made} | refused | {memory:.0f} | |"
    laid_out = found["arguments"] + found["outputs"] - found["aliased"] + found["temporaries"]
    fitted = " (fitted)" if row.fitted else ""
    return (
        f"| {row.name} | {mesh} | {_gb(found['arguments'])} | {expected} "
        f"| {_gb(found['temporaries'])} | {made}{fitted} | {_gb(laid_out)} "
        f"| {memory:.0f} | {found['seconds']:.0f} s |"
    )


def estimated(row: Row) -> Memory:
    """What the plan would say without a compiler."""
    config, target = row.read(), parse_target(row.target)
    sizes = sizes_of_config(config, target.devices)
    return estimate(read_run(config), sizes, target.chip.platform)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def table(results: Mapping) -> str:
    """All rows that were compiled."""
    return "\n".join([HEAD, *(line(row, results[row.name]) for row in ROWS if row.name in results)])


def write(file: Path, text: str) -> None:
    """Put the table between the markers of a file.

    Raises:
        UserError: the file has no markers.
    """
    whole = file.read_text()
    if BEGIN not in whole or END not in whole:
        raise UserError(f"{file} has no {BEGIN} and {END}; put them where the table shall be")
    before, after = whole.split(BEGIN)[0], whole.split(END)[1]
    file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", default="", help="only those whose name has this")
    parser.add_argument("--again", action="store_true", help="also those that are there")
    parser.add_argument("--write", type=Path, help="put the table into this file; compile nothing")
    asked = parser.parse_args(argv)
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    try:
        if asked.write:
            write(asked.write, table(results))
        else:
            compile_rows([r for r in ROWS if asked.rows in r.name], results, asked.again)
            print(table(results))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
