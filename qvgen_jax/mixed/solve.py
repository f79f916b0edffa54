"""The plan with the least damage within a budget, as an integer linear program (HiGHS).

Damages of layers add up; so do costs. Blocks whose codes lie in other containers are other segments
of a packed network, each a program of its own: a plan may have only so many.

Source: the problem is HAWQ-V3's (arXiv 2011.10680, and ILP.ipynb of its repository Zhen-Dong/HAWQ):
an integer linear program over the bits of layers. Damages are measured here, second-order
estimates there, and segments are ours.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from qvgen_jax.errors import UserError
from qvgen_jax.mixed.candidates import Candidate
from qvgen_jax.quant.blocks import MOST_SEGMENTS, split_block

_SECONDS = 60.0
_GAP = 1e-6


class Solution(NamedTuple):
    """A plan.

    Attributes:
        chosen: of every layer the number of its option.
        damage: of all together, in the unit of the damages.
        bound: no plan has less; `damage` to 1e-6 but where the time was up.
        timed_out: whether it was.
    """

    chosen: tuple[int, ...]
    damage: float
    bound: float
    timed_out: bool


def solve(
    layers: Sequence[str],
    options: Sequence[Candidate],
    damage: np.ndarray,
    costs: np.ndarray,
    most: float,
    segments: int = MOST_SEGMENTS,
) -> Solution:
    """The best option of every layer.

    Args:
        layers: own names.
        options: that each may have.
        damage, costs: `[layers, options]`.
        most: that the costs may add up to.
        segments: that the blocks may form.

    Raises:
        UserError: nothing costs as little as that.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    if costs.min(1).sum() > most * (1 + 1e-9):
        raise UserError(
            f"--budget={most:g} is less than the cheapest options need, {costs.min(1).sum():.6g}; "
            "raise it, or scan cheaper --candidates"
        )
    count, width = damage.shape
    blocks = _kinds_by_block(layers)
    borders = max(len(blocks) - 1, 0)
    # One variable for each layer and option, then one for each border between blocks. Scaled to an
    # objective of 1 or more: HiGHS also stops at an absolute gap of 1e-6.
    scale = max(float(damage.min(1).sum()), 1e-9 * float(damage.max()), 1e-30)
    objective = np.concatenate([damage.ravel() / scale, np.zeros(borders)])
    once = np.kron(np.eye(count), np.ones(width))
    constraints = [
        LinearConstraint(_pad(once, borders), 1, 1),
        LinearConstraint(_pad(costs.reshape(1, -1) / most, borders), -np.inf, 1),
    ]
    if rows := _border_rows(blocks, options, count, width):
        constraints.append(LinearConstraint(np.array(rows), -np.inf, 0))
        every = np.concatenate([np.zeros(count * width), np.ones(borders)])
        constraints.append(LinearConstraint(every[None], -np.inf, segments - 1))
    found = milp(
        objective,
        integrality=np.ones(len(objective)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"time_limit": _SECONDS, "mip_rel_gap": _GAP},
    )
    if found.x is None:
        raise UserError(
            f"no plan was found in {_SECONDS:.0f} seconds ({found.message}); raise --segments or "
            "the budget"
        )
    chosen = found.x[: count * width].reshape(count, width).argmax(1)
    value = float(damage[np.arange(count), chosen].sum())
    bound, timed_out = float(found.mip_dual_bound) * scale, found.status == 1
    return Solution(tuple(chosen.tolist()), value, bound, timed_out)


def _pad(matrix: np.ndarray, columns: int) -> np.ndarray:
    return np.pad(matrix, ((0, 0), (0, columns)))


def _kinds_by_block(layers: Sequence[str]) -> list[dict[str, int]]:
    """Of each block its linears' stacked names and their places among the layers."""
    found: dict[int, dict[str, int]] = {}
    for place, name in enumerate(layers):
        block, kind = split_block(name)
        if block is not None:
            found.setdefault(block, {})[kind] = place
    return [found[block] for block in sorted(found)]


def _border_rows(
    blocks: Sequence[dict[str, int]], options: Sequence[Candidate], count: int, width: int
) -> list[np.ndarray]:
    """Rows of `A x <= 0`: where two blocks lie differently, the variable of their border is 1."""
    borders, rows = len(blocks) - 1, []
    for operand in (0, 1):
        wide = np.array([option[operand] > 4 for option in options], np.float64)
        if wide.all() or not wide.any():
            continue
        for border in range(borders):
            for kind, place in blocks[border].items():
                row = np.zeros((count, width))
                row[place], row[blocks[border + 1][kind]] = wide, -wide
                for sign in (1, -1):
                    whole = np.concatenate([sign * row.ravel(), np.zeros(borders)])
                    whole[count * width + border] = -1
                    rows.append(whole)
    return rows
