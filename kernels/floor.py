"""The least time a product can take on a chip: its operations or its bytes, at the data sheet."""

from kernels.chips import Chip
from kernels.operands import Product


def unit_of(backend: str, product: Product, chip: Chip) -> str:
    """Of `Chip`'s units the one that a backend multiplies codes in."""
    if chip.platform == "tpu" and not chip.int8:
        return "fp8" if backend == "tpu" else "bf16"
    four = product.weight_bits <= 4 and product.act_bits <= 4
    return "int4" if backend == "tpu" and four and chip.int4 else "int8"


def least_seconds(product: Product, chip: Chip, unit: str, weight_bytes: float) -> float | None:
    """Seconds at the chip's peaks, whichever of arithmetic and memory takes longer.

    Args:
        product: with known rows.
        unit: "bf16", "int8", "int4" or "fp8".
        weight_bytes: of one weight in memory: 2 in bf16, 0.5 of a 4-bit code.

    Returns:
        None where the chip's peaks are not known.
    """
    peak = getattr(chip, unit)
    if not peak or not chip.bandwidth:
        return None
    rows, inner, columns = product.rows, product.inner, product.columns
    arithmetic = 2 * rows * inner * columns / (peak * 1e12)
    # Tokens in and out in bf16: quantization is fused or reads them once.
    moved = 2 * rows * (inner + columns) + weight_bytes * inner * columns
    return max(arithmetic, moved / (chip.bandwidth * 1e12))


def preparing_seconds(product: Product, chip: Chip, block: int) -> float | None:
    """Seconds at the chip's peaks to smooth and rotate a product's tokens in bf16.

    Nothing is fused with a rotation: it reads the tokens and writes them once more than a product.

    Args:
        product: with known rows.
        block: of the channels that a rotation mixes; 1 for smoothing alone.

    Returns:
        None where the chip's peaks are not known.
    """
    if not chip.bf16 or not chip.bandwidth:
        return None
    values = product.rows * product.inner
    arithmetic = 2 * values * block / (chip.bf16 * 1e12)
    return max(arithmetic, 4 * values / (chip.bandwidth * 1e12))
