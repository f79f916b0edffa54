"""What a layer costs at some bits, in the unit of a budget.

`bits` are bits of a weight on average, `MB` those of the codes in the export's file, `bops`
products of both operands' bits on average over multiply-adds (W4A4 is 16), and `ms` the products'
time in one forward of one clip at a chip's data-sheet peaks, as `kernels.explain` has it. In `ms` 3
bits are no faster than 4: ask for `bits` or `MB` where they shall count.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kernels.chips import Chip
from kernels.explain import explain
from kernels.operands import Product
from qvgen_jax.errors import UserError
from qvgen_jax.mixed.candidates import Candidate
from qvgen_jax.models.linears import Linear
from qvgen_jax.quant.blocks import split_block
from qvgen_jax.quant.code_planes import packed_bytes

UNITS = ("bits", "MB", "bops", "ms")


class Budget(NamedTuple):
    """The most that all layers together may cost."""

    most: float
    unit: str

    def __str__(self) -> str:
        return f"{self.most:g} {self.unit}"


def parse_budget(text: str) -> Budget:
    """A budget from `5bits`, `120MB`, `20bops` or `350ms`.

    Raises:
        UserError: it is of another form.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-zA-Z]+)\s*", text)
    units = {unit.lower(): unit for unit in UNITS}
    if not match or match[2].lower() not in units or not float(match[1]):
        raise UserError(
            f"--budget={text!r}; expected a number and one of {', '.join(UNITS)}: bits of a weight "
            "on average (5bits), size of the codes (120MB), products of bits on average (20bops), "
            "or the products' time (350ms, with --target)"
        )
    return Budget(float(match[1]), units[match[2].lower()])


def layer_costs(
    layers: Sequence[str],
    linears: Sequence[Linear],
    options: Sequence[Candidate],
    unit: str,
    chip: Chip,
    kernels: str = "auto",
) -> np.ndarray:
    """Float64 `[layers, options]`, whose sum over layers is in the budget's unit.

    Args:
        layers: own names, see `scan.layer_targets`.
        linears: of the model, which have their sizes.
        unit: of `UNITS`.
        chip: for `ms`.
        kernels: the backend that is asked for, see `kernels.choose`.

    Raises:
        UserError: `ms` of a chip whose peaks are not known.
    """
    sizes = {each.name: each for each in linears}
    found = [sizes[split_block(name)[1]] for name in layers]
    costs = {kind: _costs(kind, options, unit, chip, kernels) for kind in dict.fromkeys(found)}
    table = np.array([costs[kind] for kind in found])
    if unit == "bits":
        return table / sum(kind.inner * kind.columns for kind in found)
    if unit == "bops":
        return table / sum(kind.rows * kind.inner * kind.columns for kind in found)
    return table


def _costs(
    kind: Linear, options: Sequence[Candidate], unit: str, chip: Chip, kernels: str
) -> list[float]:
    weights = kind.inner * kind.columns
    if unit == "bits":
        return [weights * option.weights for option in options]
    if unit == "MB":
        return [kind.columns * packed_bytes(kind.inner, o.weights) / 1e6 for o in options]
    if unit == "bops":
        return [kind.rows * weights * o.weights * o.activations for o in options]
    products = [Product(kind.rows, kind.inner, kind.columns, *option) for option in options]
    rows = explain([(kind.name, 1, product) for product in products], chip, kernels)
    if any(row.seconds is None for row in rows):
        raise UserError(
            f"--budget in ms needs a chip with known peaks, {chip.name} has none; name one by "
            "--target, such as h200:1, or give the budget in bops, bits or MB"
        )
    return [1e3 * row.seconds for row in rows]


def total(costs: np.ndarray, chosen: Sequence[int]) -> float:
    """Of all layers together, each at its chosen option."""
    return float(costs[np.arange(len(costs)), list(chosen)].sum())
