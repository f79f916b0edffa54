"""What a released linear computes, in numpy: from its tensors to codes, as the release does it.

Their inference casts a checkpoint to the pipeline's type, bfloat16 by its scripts, and quantizes
the weights in it at every call. Which code a weight gets depends on that type, so every operation
here is rounded to it, as PyTorch rounds: computed in float32, stored in the type.
Source: `UniformQuantizer.quant`, `LSQQuantizer.forward` and `QuantLoRALinear` of the release.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.quant.low_rank import refactor
from qvgen_jax.quant.schedule import RankDecay, gate_at, is_boundary, phase_rank


class QuantizedLinear(NamedTuple):
    """Unsigned codes uint8 `[out, in]`, their float32 `[out]` scale and zero point, and how many of
    the codes were clipped."""

    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    clipped: int


def _round_to(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    return np.asarray(array).astype(dtype).astype(np.float32)


def effective(parameter: np.ndarray, fan_in: int, bits: int, dtype: np.dtype) -> np.ndarray:
    """A learned scale or zero point as their forward sees it.

    Scaling the gradient by a factor g is written `(p - p g) + p g` there: equal to p but for
    rounding, which moves up to one bfloat16 value in a hundred to its neighbour.
    """
    factor = np.float32(1 / math.sqrt(fan_in * (2**bits - 1)))
    parameter = _round_to(parameter, dtype)
    scaled = _round_to(parameter * factor, dtype)
    return _round_to(_round_to(parameter - scaled, dtype) + scaled, dtype)


def stored(parameter: np.ndarray, fan_in: int, bits: int, dtype: np.dtype) -> np.ndarray:
    """The number of type `dtype` whose `effective` value is nearest to a scale or zero point."""
    near = np.asarray(parameter).astype(dtype)
    choices = np.stack([near, *(np.nextafter(near, dtype.type(end)) for end in (-np.inf, np.inf))])
    errors = abs(effective(choices, fan_in, bits, dtype) - parameter)
    return np.take_along_axis(choices, errors.argmin(axis=0)[None], axis=0)[0]


def quantize(
    weight: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int, dtype: np.dtype
) -> QuantizedLinear:
    """The integers of one linear.

    Args:
        weight: `[out, in]`.
        scale: `[out, 1]`, as stored.
        zero_point: `[out, 1]`, as stored.
        bits: of the weight.
        dtype: what the release computes this layer in.
    """
    levels, fan_in = 2**bits - 1, weight.shape[1]
    scale = effective(scale, fan_in, bits, dtype)
    zero_point = effective(zero_point, fan_in, bits, dtype)
    shifted = _round_to(_round_to(weight, dtype) / scale, dtype)
    rounded = np.rint(_round_to(shifted + zero_point, dtype))
    clipped = int(np.count_nonzero((rounded < 0) | (rounded > levels)))
    codes = np.clip(rounded, 0, levels).astype(np.uint8)
    return QuantizedLinear(codes, scale[:, 0], zero_point[:, 0], clipped)


def dequantize(
    codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int, dtype: np.dtype
) -> np.ndarray:
    """Weights `[out, in]` of type `dtype` that `quantize` gives these codes; the rest as there."""
    fan_in = codes.shape[1]
    zero_point = effective(zero_point, fan_in, bits, dtype)
    return (effective(scale, fan_in, bits, dtype) * (codes - zero_point)).astype(dtype)


def merge_adapter(
    weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float, dtype: np.dtype
) -> np.ndarray:
    """The weight `[out, in]` with its adapter `scale * up @ down` added, float32.

    Args:
        down: `[r, in]`, named loraA.
        up: `[out, r]`, named loraB.
        scale: alpha / r.
    """
    product = _round_to(up.astype(np.float32) @ down.astype(np.float32), dtype)
    scaled = _round_to(product * np.float32(scale), dtype)
    return _round_to(_round_to(weight, dtype) + scaled, dtype)


def branch_at(
    left: np.ndarray, right: np.ndarray, step: int, decay: RankDecay
) -> dict[str, np.ndarray]:
    """The low-rank branch that training's step (from 0) computes with, from a file saved before it.

    On entering a new phase the release refactors first; so does this.

    Args:
        left: L `[out, r]` as stored, stale columns included.
        right: R `[r, in]`.

    Returns:
        L, R and gate of the components that live at that step, float32.
    """
    rank = phase_rank(step, decay)
    left, right = (jnp.asarray(np.asarray(side, np.float32)) for side in (left, right))
    if is_boundary(step, decay):
        left, right = jax.jit(refactor)(left, right, rank)
    gate = gate_at(step, decay)
    parts = {"L": left[:, :rank], "R": right[:rank], "gate": gate[:rank]}
    return {name: np.asarray(part, np.float32) for name, part in parts.items()}
