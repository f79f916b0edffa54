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
import re
from math import prod
from typing import NamedTuple

from kernels.tpu_ahead import TOPOLOGIES, Case, Compiled, compile_for

TARGET = 0.55
"""Of XLA's slots, what ours may take on chips with an int4 unit."""

SHAPES = (
    ("Wan-14B d x d", 32760, 5120, 5120),
    ("Wan-14B ffn up", 32760, 5120, 13824),
    ("Wan-14B ffn down", 32760, 13824, 5120),
    ("Wan-1.3B ffn up", 32760, 1536, 8960),
    ("Wan-1.3B ffn down", 32760, 8960, 1536),
    ("CogVideoX-2B ffn up", 17776, 1920, 7680),
    ("CogVideoX-2B ffn down", 17776, 7680, 1920),
)

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


def table(chips: list[str], shapes: list[tuple[str, int, int, int]]) -> str:
    """Ours and XLA's, per chip and shape."""
    rows = [
        f"{'chip':6} {'product':22} {'M x K x N':20} {'ours':>14} {'XLA int8':>14} "
        f"{'slots / 10^6 MAC':>18} {'slots':>6} {'cycles':>6}"
    ]
    for chip in chips:
        cases = [Case(kernel, *shape) for _, *shape in shapes for kernel in ("codes", "xla")]
        done = [total(one) for one in compile_for(chip, cases)]
        for (name, *shape), ours, xla in zip(shapes, done[::2], done[1::2], strict=True):
            mine, theirs = (1e6 * sum(s.opcodes.values()) / prod(shape) for s in (ours, xla))
            rows.append(
                f"{chip:6} {name:22} {' x '.join(map(str, shape)):20} {_opcodes(ours):>14} "
                f"{_opcodes(xla):>14} {f'{mine:.3f} : {theirs:.3f}':>18} {mine / theirs:6.3f} "
                f"{ours.cycles / xla.cycles:6.3f}"
            )
    return "\n".join(rows)


def _opcodes(slots: Slots) -> str:
    return "+".join(slots.opcodes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", nargs="+", choices=TOPOLOGIES, default=["v5e", "v6e"])
    parser.add_argument("--shape", nargs="+", default=[""], help="parts of names of products")
    asked = parser.parse_args()
    wanted = [shape for shape in SHAPES if any(part in shape[0] for part in asked.shape)]
    print(table(asked.chip, wanted))
