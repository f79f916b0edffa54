"""What travels between devices in one run of a compiled program, from its text.

An operation in a loop counts as often as the loop turns, which XLA writes beside most of them.
A TPU's reduce-scatter is written as a computation of its own name, an all-reduce and a slice of it.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "recv")
BETWEEN_SLICES = "recv"
"""What arrives over the network between TPU slices: there it is sent and received, by the hosts."""


_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*->.*\{$")
_OPERATION = re.compile(
    rf"^(?:ROOT )?%?[\w.\-]+ = (?P<shape>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCATTERS = "all-reduce-scatter"
_BODY = re.compile(r"\bbody=%?([\w.\-]+)")
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_CONSTANT = re.compile(r" s32\[\]\S* constant\((\d+)\)")
_SHAPE = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_SLICES = re.compile(r'_xla_megascale_target="?\{\{?([\d,]+)\}')
_BETWEEN = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_LISTED = re.compile(r"replica_groups=\{\{([\d,]*)\}")
_COUNTED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
# An axis of it, or a part of one: 'fsdp':(2)4 is the four within every eight.
_AXIS = re.compile(r"'([^']*)'(?::\(\d+\)(\d+))?")


class Collective(NamedTuple):
    """Operations of one kind, type and number of devices.

    Attributes:
        kind: one of `KINDS`.
        dtype: as XLA writes it: s8, bf16, f32.
        devices: that take part in each; between slices, how many slices do.
        count: in one run of the program.
        bytes: that arrive at each device from others in all of them. An all-reduce is counted as
            it goes over a ring, a reduce-scatter and an all-gather.
    """

    kind: str
    dtype: str
    devices: int
    count: int
    bytes: int


def collectives(text: str) -> list[Collective]:
    """Every kind of collective of a compiled program, the largest first.

    Args:
        text: of `jax.stages.Compiled.as_text()`.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    total: dict[tuple[str, str, int], list[int]] = {}
    for name, lines in computations.items():
        scatters = name.startswith(_SCATTERS)
        for line in lines:
            for kind, dtype, devices, size in _of_line(line):
                if scatters and kind == "all-reduce":
                    kind, size = "reduce-scatter", size // 2  # A ring's first half.
                sums = total.setdefault((kind, dtype, devices), [0, 0])
                sums[0] += times.get(name, 0)
                sums[1] += times.get(name, 0) * size
    found = [Collective(*key, *sums) for key, sums in total.items() if sums[0]]
    return sorted(found, key=lambda c: -c.bytes)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Lines of each computation by its name, and the name of the one that is run."""
    computations: dict[str, list[str]] = {}
    entry, name = "", None
    for raw in text.splitlines():
        line = raw.strip()
        if head := _HEAD.match(line):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif line == "}":
            name = None
        elif name is not None:
            computations[name].append(line)
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int]:
    """How often each computation runs."""
    times = {entry: 1}
    # Callees come before their callers in XLA's text, and the entry last.
    for name in reversed(computations):
        if name not in times:
            continue
        for line in computations[name]:
            for called, turns in _calls(line, computations):
                times[called] = times.get(called, 0) + turns * times[name]
    return times


def _calls(line: str, computations: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    turns = 1
    body = _BODY.search(line)
    if body:
        turns = _turns(line, computations)
    called = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        called += [name.strip().lstrip("%") for name in branches.split(",")]
    for name in called:
        if name in computations:
            yield name, turns if body and name == body[1] else 1


def _turns(line: str, computations: dict[str, list[str]]) -> int:
    if known := _TURNS.search(line):
        return int(known[1])
    # A scan compares its counter with a constant.
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    return max((int(n) for text in lines for n in _CONSTANT.findall(text)), default=1)


def _of_line(line: str) -> Iterator[tuple[str, str, int, int]]:
    """Kind, type, devices and bytes that arrive, of each array that an operation moves."""
    operation = _OPERATION.match(line)
    if not operation:
        return
    kind, between = operation["kind"], _BETWEEN.search(line)
    if kind == BETWEEN_SLICES and not between:
        return  # From the program's own host, or one device's half of a permutation.
    devices, shapes = _devices(line, kind), _SHAPE.findall(operation["shape"])
    if kind == BETWEEN_SLICES:
        shapes = shapes[:1]  # The rest are counters.
    if operation["start"] and kind in ("all-gather", "collective-permute"):
        # Of a started one the result holds the operands too, and at times counters.
        shapes = [shape for shape in shapes if shape[1]]
        shapes = shapes[len(shapes) // 2 :]
    for dtype, sides in shapes:
        size = math.prod(int(n) for n in sides.split(",") if n) * _bits(dtype) // 8
        like = between[1].lower().replace("_", "-") if kind == BETWEEN_SLICES else kind
        yield kind, dtype, devices, int(size * _share(like, devices))


def _share(kind: str, devices: int) -> float:
    """Bytes that arrive at a device, of those of its result."""
    if kind == "collective-permute":
        return 1.0
    if kind == "reduce-scatter":
        return devices - 1.0  # Every other device sends it a part as large as its result.
    others = (devices - 1) / devices
    return 2 * others if kind == "all-reduce" else others


def _devices(line: str, kind: str) -> int:
    if kind == "collective-permute":
        return 2
    if kind == BETWEEN_SLICES:
        return len(_SLICES.search(line)[1].split(","))
    if counted := _COUNTED.search(line):
        return int(counted[2])
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])}
        return math.prod(int(part or sizes[name]) for name, part in _AXIS.findall(mesh[2]))
    if listed := _LISTED.search(line):
        return len(listed[1].split(","))
    return 1


def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    bits = re.search(r"\d+", dtype)
    return int(bits[0]) if bits else 0
