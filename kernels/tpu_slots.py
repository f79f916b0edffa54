"""Slots of the matrix unit that a TPU executes for a product: ours beside XLA's int8 dot.

    python -m kernels.tpu_slots                  # needs libtpu, no TPU: pip install 'jax[tpu]'

Counted in the compiler's final schedule: every `vmatmul` times the trips of the loops around it.
On v5e, v5p (16 cycles between two on a unit) and v6e (8) one takes equally long whatever its type,
but of int4 it is of 64 rows and of int8 of 32. On TPU7x, where XLA makes float32 of integers, slots
of the two types are not compared. v5p has two cores to a device; its counts are of one. The
schedule's bundles, one a cycle while nothing waits for memory, times the same trips tell how much
of the gain is lost to vector instructions; what is done once per block of rows is not in them.

XLA's dot of the 14B's shapes takes minutes to compile: `--shape 1.3B CogVideoX` leaves it out.
"""

import argparse
import importlib.util
import re
import sys
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from kernels.shapes import Shape, of_models
from kernels.tpu_ahead import TOPOLOGIES, Case, Compiled, compile_for

TARGET = 0.55
"""Of XLA's slots, what ours may take on chips with an int4 unit."""

_MODELS = ("Wan-14B 480p", "Wan-1.3B 480p", "CogVideoX-2B")
SHAPES = tuple(shape for shape in of_models(*_MODELS) if min(shape[2:]) > 512)

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB|LH|LE|PB|PF|CT)?\s*:\s+(>*)\s*\{(\})?")
_LIMIT = re.compile(r"scmp\.ge\.s32\.totalorder %s\w+, (\d+) /\* loop exit test")
_PIPELINE = re.compile(r"^iteration_bounds: \(([\d, ]+)\)")
_OPCODE = re.compile(r"\bvmatmul\.(?:mubr\.)?(\w+)")


class Slots(NamedTuple):
    """What an operation executes.

    Attributes:
        opcodes: of its `vmatmul` instructions, by the type of their operands, how many.
        cycles: bundles of all loops that multiply.
        prologue: bundles of one trip through the loops inside that do not multiply.
    """

    opcodes: dict[str, int]
    cycles: int
    prologue: int


class _Loop:
    """A loop of a schedule; the outermost stands for what is in none."""

    def __init__(self, outside: "_Loop | None") -> None:
        self.outside, self.opcodes, self.bundles = outside, [], 0
        self.limit = self.steps = None

    @property
    def trips(self) -> int:
        """Times that the body runs.

        A loop over the grid runs longer than there are steps, by those that only copy the first
        blocks in and the last ones out.

        Raises:
            ValueError: the schedule does not tell.
        """
        if self.outside is None:
            return 1
        if self.limit is None or (self.steps or self.limit) not in range(
            self.limit - 2, self.limit + 1
        ):
            raise ValueError(f"a loop of {self.steps} steps ends at {self.limit}")
        return (self.steps or self.limit) * self.outside.trips


def count(schedule: str) -> Slots:
    """Slots of one operation's schedule.

    Raises:
        ValueError: a loop around a multiplication ends at a number that the schedule does not tell.
    """
    stack = [_Loop(None)]
    loops = list(stack)
    for line in schedule.splitlines():
        if bundle := _BUNDLE.match(line):
            label, depth, empty = bundle[1], len(bundle[2]), bundle[3]
            # An empty bundle is not marked with the loops that it is in.
            depth = len(stack) - 1 if empty else depth
            del stack[depth + (label != "LB") :]
            if label == "LB":
                stack.append(_Loop(stack[-1]))
                loops.append(stack[-1])
            stack[-1].bundles += 1
            stack[-1].opcodes += _OPCODE.findall(line)
            if limit := _LIMIT.search(line):
                stack[-1].limit = int(limit[1])
        elif (steps := _PIPELINE.match(line)) and len(stack) > 1:
            stack[1].steps = prod(map(int, steps[1].split(",")))
    opcodes: dict[str, int] = {}
    multiplying = [loop for loop in loops if loop.opcodes]
    around = {loop.outside for loop in multiplying} | set(multiplying)
    for loop in multiplying:
        for opcode in loop.opcodes:
            opcodes[opcode] = opcodes.get(opcode, 0) + loop.trips
    return Slots(
        opcodes,
        sum(loop.bundles * loop.trips for loop in loops if loop in around),
        sum(loop.bundles * (loop.limit or 0) for loop in loops if loop not in around),
    )


def total(compiled: Compiled) -> Slots:
    """Slots of all operations of a program.

    Raises:
        RuntimeError: it did not compile.
    """
    if compiled.error:
        raise RuntimeError(compiled.error)
    # TLP is the program that calls the others.
    slots = [count(text) for name, text in compiled.bundles.items() if name != "TLP"]
    slots = [one for one in slots if one.opcodes]
    opcodes = {
        opcode: sum(one.opcodes.get(opcode, 0) for one in slots)
        for opcode in sorted({opcode for one in slots for opcode in one.opcodes})
    }
    return Slots(opcodes, sum(s.cycles for s in slots), sum(s.prologue for s in slots))


def table(chips: list[str], shapes: list[Shape]) -> str:
    """Ours and XLA's, per chip and shape."""
    rows = [
        f"{'chip':6} {'product':23} {'M x K x N':20} {'ours':>14} {'XLA int8':>14} "
        f"{'slots / 10^6 MAC':>18} {'slots':>6} {'cycles':>6}"
    ]
    for chip in chips:
        cases = [Case(kernel, *shape[2:]) for shape in shapes for kernel in ("codes", "xla")]
        done = [total(one) for one in compile_for(chip, cases)]
        for (model, layer, *shape), ours, xla in zip(shapes, done[::2], done[1::2], strict=True):
            mine, theirs = (1e6 * sum(s.opcodes.values()) / prod(shape) for s in (ours, xla))
            rows.append(
                f"{chip:6} {f'{model}, {layer}':23} {' x '.join(map(str, shape)):20} "
                f"{_opcodes(ours):>14} {_opcodes(xla):>14} "
                f"{f'{mine:.3f} : {theirs:.3f}':>18} {mine / theirs:6.3f} "
                f"{ours.cycles / xla.cycles:6.3f}"
            )
    return "\n".join(rows)


def _opcodes(slots: Slots) -> str:
    return "+".join(slots.opcodes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m kernels.tpu_slots", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=["v5e", "v6e"])
    parser.add_argument("--shape", nargs="+", default=[""], help="parts of names of products")
    asked = parser.parse_args(argv)
    names = [f"{shape.model}, {shape.layer}" for shape in SHAPES]
    wrong = ""
    if unknown := [part for part in asked.shape if not any(part in name for name in names)]:
        wrong = f"--shape {' '.join(unknown)}: in no name of {'; '.join(names)}"
    elif importlib.util.find_spec("libtpu") is None:
        wrong = "libtpu is not installed: pip install 'jax[tpu]'"
    if wrong:
        print(f"error: {wrong}", file=sys.stderr)
        return 2
    pairs = zip(names, SHAPES, strict=True)
    wanted = [shape for name, shape in pairs if any(part in name for part in asked.shape)]
    print(table(asked.chip, wanted))
    return 0


if __name__ == "__main__":
    sys.exit(main())
