"""The release's arithmetic a second time, as its code writes it: what an import is checked by.

The import computes in float32 and rounds to the type after every operation (`released_arithmetic`).
Here arrays are of the type itself and numpy rounds, straight-through rounding is written out, ranks
and gates are counted anew, adapters and singular values are float64. Neither module uses the other.
Source: `training/quant/quant.py` of the release; the docstrings name its functions.
"""

import math
from typing import NamedTuple

import numpy as np

_BLOCK = 1 << 22


def grad_scale(parameter: np.ndarray, fan_in: int, bits: int) -> np.ndarray:
    """`LSQQuantizer.grad_scale`: a scale or zero point `[out, 1]` as their forward sees it."""
    factor = np.float32(1.0 / (fan_in * (2**bits - 1)) ** 0.5)
    scaled = (parameter.astype(np.float32) * factor).astype(parameter.dtype)
    return (parameter - scaled) + scaled


def quant(weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int) -> np.ndarray:
    """`UniformQuantizer.quant` with the rounding of `LSQQuantizer.build`: codes uint8 `[out, in]`.

    Args:
        weight: `[out, in]`.
        scale: `[out, 1]` from `grad_scale`, of the weight's type, as is `zero_point`.
    """
    with np.errstate(all="ignore"):  # A scale of 0 is the checkpoint's fault, and its codes differ.
        ratio = weight / scale + zero_point
        rounded = (np.rint(ratio) - ratio) + ratio
        return np.clip(rounded.astype(np.float32), 0, 2**bits - 1).astype(np.uint8)


def dequant(codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    """`UniformQuantizer.dequant`: the fake-quantized weight `[out, in]`, of the scale's type."""
    return scale * (codes.astype(scale.dtype) - zero_point)


def merge_lora(
    weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest weight `[out, in]` that merging an adapter can give.

    The product is a sum of r terms in float32 whose last bits depend on the order of summing. All
    that follows is monotone, so the two ends of the product give the two ends of the weight.

    Args:
        down: `[r, in]`, named loraA.
        up: `[out, r]`, named loraB.
        scale: alpha / r.
    """
    down, up, dtype = down.astype(np.float64), up.astype(np.float64), weight.dtype
    slack = 2.0**-23 * len(down) * (abs(up) @ abs(down))  # Twice the error of any order of sums.
    product, ends = up @ down, []
    for end in (product - slack, product + slack):
        rounded = end.astype(np.float32).astype(dtype).astype(np.float32)
        ends.append(weight + (rounded * np.float32(scale)).astype(dtype))
    return np.minimum(*ends), np.maximum(*ends)


class Branch(NamedTuple):
    """The low-rank branch at a step: L `[out, rank]`, R `[rank, in]`, gate `[rank]`, float32.

    `refactored` says that L and R are still to be brought into the SVD form of their product.
    """

    left: np.ndarray
    right: np.ndarray
    gate: np.ndarray
    refactored: bool


def set_alpha(left: np.ndarray, right: np.ndarray, step: int, phase_steps: int) -> Branch:
    """`ProgressiveLoRAQuantizer.set_alpha_L_R` of a checkpoint's whole L and R."""
    halvings, begun = divmod(step, phase_steps)
    rank = left.shape[1] >> halvings
    gate = np.full(rank, (1 + math.cos(math.pi * begun / phase_steps)) / 2, np.float32)
    if rank >= 2:
        gate[: rank // 2] = 1
    sides = left[:, :rank].astype(np.float32), right[:rank].astype(np.float32)
    return Branch(*sides, gate, halvings > 0 and begun == 0)


class Refactoring(NamedTuple):
    """How far L and R are from the SVD form `(U sqrt(S), sqrt(S) V^T)` of a product.

    Attributes:
        product: the largest difference of their product.
        relative: the same over the product's largest singular value.
        left: the largest difference between `L^T L` and S, over the same.
        right: between `R R^T` and S.
    """

    product: float
    relative: float
    left: float
    right: float


def low_rank_errors(branch: Branch, left: np.ndarray, right: np.ndarray) -> Refactoring:
    """L and R beside `low_rank_decomposition` of the branch's product.

    All are 0 for the SVD form alone, whose signs are free: L and R themselves cannot be compared.

    Args:
        branch: to be refactored.
        left: `[out, rank]` to be checked.
        right: `[rank, in]`.
    """
    one, other = (
        [side.astype(np.float64) for side in pair]
        for pair in ((branch.left, branch.right), (left, right))
    )
    triangles = np.linalg.qr(one[0])[1] @ np.linalg.qr(one[1].T)[1].T
    found = np.linalg.svd(triangles, compute_uv=False)
    values = np.pad(found, (0, left.shape[1] - len(found)))
    error, rows = 0.0, max(1, _BLOCK // right.shape[1])
    for start in range(0, len(left), rows):
        block = slice(start, start + rows)
        difference = one[0][block] @ one[1] - other[0][block] @ other[1]
        error = max(error, float(abs(difference).max()))
    grams = other[0].T @ other[0], other[1] @ other[1].T
    spreads = [float(abs(gram - np.diag(values)).max()) for gram in grams]
    norm = float(values[0]) or 1.0
    return Refactoring(error, error / norm, *(spread / norm for spread in spreads))
