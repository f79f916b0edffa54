"""Every tensor of a packed import recomputed from its checkpoint, beside what is there."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from convert import released_formula as formula
from convert.certificate import compare, largest_error
from convert.released_names import Linear, ReleasedPlan
from convert.released_options import ReleasedOptions
from convert.tensors import Tensors
from qvgen_jax.quant.code_planes import pack_codes, packed_bytes, unpack_codes
from qvgen_jax.quant.schedule import RankDecay

_BLOCK = 1 << 22
# The import's cosine and SVD are float32. Seen at the sizes of Wan 14B, rank 32: gates off by 1e-7,
# the product of L and R by 6e-8, `L^T L` by 2e-6 of the largest singular value.
_TOLERANCE, _SPREAD_TOLERANCE = 1e-6, 2e-5
Entry = dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class ReleasedCheck:
    """Goes through both folders, linear by linear.

    Attributes:
        ours: the checkpoint's tensors.
        theirs: the packed transformer's.
        decay: the schedule that the branch was rebuilt for; None where it was left away.
        float32: parts of the names of the layers that the release computes in float32.
    """

    ours: Tensors
    theirs: Tensors
    plan: ReleasedPlan
    options: ReleasedOptions
    decay: RankDecay | None
    float32: tuple[str, ...]
    adapter_scale: float

    @property
    def rank(self) -> int:
        """Of the branch that every quantized linear must keep."""
        if self.decay is None:
            return 0
        return self.plan.rank >> (self.options.released_step // self.decay.phase_steps)

    def entries(self) -> Iterator[tuple[str, Entry]]:
        """What is found of every tensor that must be there, None where it is missing."""
        for name in self.plan.others:
            yield name, self._plain(name, self.ours[name].astype(np.float32))
        for name, source in self.plan.kept.items():
            array = self.ours[source]
            kept = array if array.ndim == 2 else array.astype(np.float32)
            yield name, self._plain(name, kept)
        for linear in self._linears():
            for leaf, entry in self._linear(linear):
                yield f"{linear.stem}.{leaf}", entry

    def _linears(self) -> Iterator[Linear]:
        for linears in self.plan.quantized.values():
            yield from linears

    def _plain(self, name: str, expected: np.ndarray) -> Entry:
        return compare(name, {name: expected}, self.theirs) if name in self.theirs else None

    def _linear(self, linear: Linear) -> Iterator[tuple[str, Entry]]:
        def read(leaf: str) -> np.ndarray:
            return self.ours[f"{linear.stem}.{leaf}"]

        weight = read("w")
        if set(linear.stem.split(".")) & set(self.float32):
            weight = weight.astype(np.float32)
        size = linear.fan_in, self.options.bits[0]
        scale, zero_point = (
            formula.grad_scale(read(f"wquantizer.{leaf}").astype(weight.dtype), *size)
            for leaf in ("scale", "zero_point")
        )
        adapter = [read(f"lora{side}.weight") for side in "AB"] if self.plan.adapter_rank else []
        yield "codes", self._codes(linear, _Released(weight, scale, zero_point, *adapter))
        clips = np.column_stack([read(f"aquantizer.{side}") for side in ("lower", "upper")])
        plain = {"scale": scale[:, 0], "zero_point": zero_point[:, 0], "clips": clips}
        plain |= {"bias": read("b")} if linear.bias else {}
        for leaf, array in plain.items():
            yield leaf, self._plain(f"{linear.stem}.{leaf}", array.astype(np.float32))
        if self.rank:
            yield from self._branch(linear).items()

    def _codes(self, linear: Linear, released: "_Released") -> Entry:
        name, bits = f"{linear.stem}.codes", self.options.bits[0]
        if name not in self.theirs:
            return None
        packed, found = self.theirs[name], None
        if self._fits(name, np.uint8, linear.fan_out, packed_bytes(linear.fan_in, bits)):
            found = unpack_codes(packed, bits, linear.fan_in)
        levels = self._scale_and_zero_point(linear)
        expected = np.empty((linear.fan_out, linear.fan_in), np.uint8)
        error = largest = 0.0
        rows = max(1, _BLOCK // linear.fan_in)
        for start in range(0, linear.fan_out, rows):
            block = slice(start, start + rows)
            lowest, highest = released.codes(block, bits, self.adapter_scale)
            # One number nearly always. Where an adapter leaves two, either is what it may hold.
            expected[block] = lowest if found is None else np.clip(found[block], lowest, highest)
            fake = released.dequantized(expected[block], block)
            largest = max(largest, float(abs(fake).max()))
            if found is not None and levels is not None:
                weight = levels[0][block] * (found[block] - levels[1][block])
                error = float(np.maximum(error, abs(weight - fake).max()))
        entry = compare(name, {name: pack_codes(expected, bits)}, {name: packed})
        errors = (None, None) if found is None else largest_error(expected, found)
        differ = expected.size if found is None else int(np.count_nonzero(found != expected))
        known = found is not None and levels is not None and math.isfinite(error)
        return entry | {
            "equal": entry["equal"] and not differ,
            "max_error": errors[0],
            "max_relative_error": errors[1],
            "codes": expected.size,
            "codes_that_differ": differ,
            "max_weight_error": error if known else None,
            "max_relative_weight_error": error / (largest or 1.0) if known else None,
        }

    def _fits(self, name: str, dtype: np.dtype, *shape: int) -> bool:
        info = self.theirs.infos.get(name)
        return info is not None and (info.dtype, info.shape) == (dtype, shape)

    def _scale_and_zero_point(self, linear: Linear) -> tuple[np.ndarray, np.ndarray] | None:
        """Those of the packed layer, float64 `[out, 1]`; None where it has none that fit."""
        names = [f"{linear.stem}.{leaf}" for leaf in ("scale", "zero_point")]
        if not all(self._fits(name, np.float32, linear.fan_out) for name in names):
            return None
        return tuple(self.theirs[name][:, None].astype(np.float64) for name in names)

    def _branch(self, linear: Linear) -> dict[str, Entry]:
        stem = linear.stem
        sides = (self.ours[f"{stem}.wquantizer.{side}"] for side in "LR")
        branch = formula.set_alpha(*sides, self.options.released_step, self.decay.phase_steps)
        expected = {"L": branch.left, "R": branch.right, "gate": branch.gate}
        found = {leaf: self._plain(f"{stem}.{leaf}", array) for leaf, array in expected.items()}
        gate = found["gate"]
        if gate and not gate["equal"]:
            found["gate"] = _within(gate, gate["max_error"], gate["max_error"], _TOLERANCE)
        if branch.refactored and all(
            self._fits(f"{stem}.{side}", np.float32, *expected[side].shape) for side in "LR"
        ):
            held = (self.theirs[f"{stem}.{side}"] for side in "LR")
            errors = formula.low_rank_errors(branch, *held)
            for side, spread in (("L", errors.left), ("R", errors.right)):
                worst = errors.relative if spread <= _SPREAD_TOLERANCE else spread
                found[side] = _within(found[side], errors.product, worst, _TOLERANCE)
        return found


class _Released(NamedTuple):
    """One linear of the checkpoint.

    Attributes:
        weight: `[out, in]`, of the type that the release computes in.
        scale: `[out, 1]` as its forward sees it, as is `zero_point`.
        down: `[r, in]` of an adapter, with `up` `[out, r]`; None where there is none.
    """

    weight: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    down: np.ndarray | None = None
    up: np.ndarray | None = None

    def codes(self, rows: slice, bits: int, adapter_scale: float) -> list[np.ndarray]:
        """The lowest and the highest code that each weight of these rows may have."""
        ends = (self.weight[rows],)
        if self.down is not None:
            ends = formula.merge_lora(self.weight[rows], self.down, self.up[rows], adapter_scale)
        size = self.scale[rows], self.zero_point[rows], bits
        codes = [formula.quant(end, *size) for end in ends]
        return [end.reduce(codes) for end in (np.minimum, np.maximum)]

    def dequantized(self, codes: np.ndarray, rows: slice) -> np.ndarray:
        """The fake-quantized weight of these rows, float64."""
        return formula.dequant(codes, self.scale[rows], self.zero_point[rows]).astype(np.float64)


def _within(
    entry: dict[str, Any], error: float | None, relative: float | None, tolerance: float
) -> dict[str, Any]:
    """The entry of a tensor whose bits need not be equal, nor do equal bits make it so."""
    equal = relative is not None and relative <= tolerance
    found = {"max_error": error, "max_relative_error": relative, "tolerance": tolerance}
    held = entry.pop("converted", {}) if equal else {}
    return entry | held | found | {"equal": equal}
