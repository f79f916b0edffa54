"""`quantized_matmul` for NVIDIA GPUs from Ampere on, as one Triton program run through jax-triton.

Weights of up to 4 bits stay two in a byte until they are in registers (layout `columns_halved`);
the tensor cores multiply int8 and add in int32 on every chip. Four-bit tensor cores, which Ampere
and Ada have, are beyond Triton: against bf16 this gives twice the rate on A100 and H100, four times
on a 4090, and a quarter of the weights' bytes everywhere.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.chips import Chip
from kernels.operands import LONGEST_INT32_SUM, Product, Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.triton_launch import compute_capability, launch, triton_module

_GROUP = 8


class Tile(NamedTuple):
    """What one program computes, and with what.

    Attributes:
        rows, columns: of the result.
        inner: of each half of the inner axis in a step of the loop, which takes both halves.
        warps: of 32 threads.
        stages: of the pipeline that loads from memory.
    """

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def layout(product: Product) -> str:
    """The layout of `kernels.layouts` that a product's weights are in."""
    return "columns_halved" if product.weight_bits <= 4 else "columns"


def aligned_half(inner: int) -> int:
    """Half the inputs, rounded up to the 16 bytes of a wide load; exact at the models' sizes."""
    return -(-inner // 32) * 16


def tile_for(capability: int, product: Product, rank: int = 0) -> Tile:
    """The table of tiles: rows x columns x inner, warps. Nobody has timed it.

    | compute capability | tokens | columns | weights | tile | with a low rank |
    |---|---|---|---|---|---|
    | 8.0, 8.6, 8.9 | > 512 | > 128 | any | 256 x 128 x 64, 8 | 128 x 128 x 64, 8 |
    | 9.0 | > 512 | > 128 | up to 4 bits | 128 x 256 x 128, 8 | 128 x 128 x 128, 8 |
    | 9.0 | > 512 | > 128 | 5 to 8 bits | 128 x 256 x 64, 8 | 128 x 128 x 64, 8 |
    | any | 33 to 512, or columns <= 128 | any | any | 64 x 128 x 64, 4 | the same |
    | any | up to 32 | any | any | 16 x 64 x 128, 4 | the same |

    The largest that keep everything in registers: on Ampere and Ada 256 x 128 reads a third of the
    shared memory per product that 128 x 128 does, where reading takes as long as multiplying. An
    inner 128 becomes 64 where it does not divide half the inputs (CogVideoX-2B's 1920).
    """
    rows, halved = product.rows, layout(product) == "columns_halved"
    if rows <= 32:
        tile = Tile(16, 64, 128, 4, 4)
    elif rows <= 512 or product.columns <= 128:
        tile = Tile(64, 128, 64, 4, 3)
    elif rank:
        tile = Tile(128, 128, 128 if capability >= 90 and halved else 64, 8, 3)
    elif capability >= 90:
        tile = Tile(128, 256, 128 if halved else 64, 8, 3)
    else:
        tile = Tile(256, 128, 64, 8, 3)
    divides = aligned_half(product.inner) % tile.inner == 0
    return tile if divides else tile._replace(inner=64)


ADDS_LOW_RANK = True  # `kernels.quantized_matmul` leaves a branch to the epilogue here.


def check(product: Product, chip: Chip | None = None) -> None:
    """Whether the program computes this product; every chip from Ampere on takes the same.

    Raises:
        NotImplementedError: with the reason.
    """
    del chip
    if not 2 <= product.weight_bits <= 8 or not 2 <= product.act_bits <= 8:
        raise NotImplementedError(f"{product}: the Triton program takes 2 to 8 bits")
    if product.inner > LONGEST_INT32_SUM:
        raise NotImplementedError(
            f"{product}: the int32 accumulator holds sums over at most {LONGEST_INT32_SUM} inputs"
        )
    if jnp.dtype(product.out_dtype).name not in ("bfloat16", "float32"):
        raise NotImplementedError(f"{product}: the Triton program stores bfloat16 or float32")


def program_constants(
    product: Product, tile: Tile, *, asymmetric: bool, bias: bool, rank: int = 0
) -> dict[str, Any]:
    """What the program of a product is specialised to."""
    return {
        "N": product.columns,
        "K": product.inner,
        "HALF": aligned_half(product.inner),
        "HALVED": layout(product) == "columns_halved",
        "ASYMMETRIC": asymmetric,
        "BIAS": bias,
        "RANK": rank,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.columns,
        "BLOCK_K": tile.inner,
        "BLOCK_R": max(16, 1 << (rank - 1).bit_length()) if rank else 16,
        "GROUP": _GROUP,
        "ASSEMBLY": True,
    }


def quantized_matmul(
    tokens: QuantizedTokens,
    weight: Weight,
    *,
    bits: tuple[int, int] | None = None,
    out_dtype: jnp.dtype,
    interpret: bool = False,
    tile: Tile | None = None,
    low_rank: tuple[jax.Array, jax.Array] | None = None,
    capability: int | None = None,
) -> jax.Array:
    """`dequantized tokens @ dequantized weights + bias`, plus a low-rank term.

    Integers are exact; float32 corrections are those of `kernels.quantized_matmul`, in its order.

    Args:
        tokens: codes int8 `[M, K]`, statistics float32 `[M, 1]`.
        weight: codes int8 `[N, ceil(K / 2)]` for up to 4 bits, `[N, K]` for more: which of them is
            seen from the shape. K = 1 has the same shape in both and is taken for halved.
        bits: of weights and activations; the shape of the codes tells as much if None.
        out_dtype: bfloat16 or float32.
        interpret: run in Triton's interpreter, which needs TRITON_INTERPRET=1 in the environment.
        tile: in place of the table's.
        low_rank: `h [M, r]` (the tokens times R^T times the gate) and `L [N, r]`, which add
            `h @ L^T` in float32; both are cast to out_dtype first.
        capability: what to compile for, such as 90; asked from the device if None.

    Returns:
        `[M, N]` in out_dtype.

    Raises:
        NotImplementedError: no triton, no jax-triton, no CUDA device from Ampere on, or a product
            that `check` refuses; the message says which.
    """
    (rows, inner), columns = tokens.codes.shape, weight.codes.shape[0]
    bits = bits or (4 if weight.codes.shape[1] == -(-inner // 2) else 8, 8)
    product = Product(rows, inner, columns, *bits, out_dtype)
    check(product)
    if weight.codes.dtype != jnp.int8:
        raise NotImplementedError(
            f"codes of {weight.codes.dtype}; the Triton program reads int8 in {layout(product)!r}"
        )
    program = triton_module("triton_matmul_program").quantized_matmul_program
    if capability is None and not interpret:
        capability = compute_capability()
    rank = 0 if low_rank is None else low_rank[0].shape[1]
    tile = tile or tile_for(capability or 80, product, rank)
    constants = program_constants(
        product,
        tile,
        asymmetric=weight.zero_point is not None,
        bias=weight.bias is not None,
        rank=rank,
    )
    # Absent operands need an address all the same.
    absent = weight.scale
    hidden, left = (absent, absent) if low_rank is None else low_rank
    half = aligned_half(inner)
    arguments = [
        _with_aligned_halves(tokens.codes, half),
        *(statistic.reshape(rows).astype(jnp.float32) for statistic in tokens[1:]),
        _with_aligned_halves(weight.codes, half, halved=bits[0] <= 4),
        weight.scale,
        absent if weight.zero_point is None else weight.zero_point,
        weight.code_sum,
        absent if weight.bias is None else weight.bias,
        hidden.astype(out_dtype),
        left.astype(out_dtype),
        rows,
    ]
    (y,) = launch(
        program,
        arguments,
        [jax.ShapeDtypeStruct((rows, columns), out_dtype)],
        constants | {"ASSEMBLY": not interpret},
        grid=-(-rows // tile.rows) * -(-columns // tile.columns),
        warps=tile.warps,
        stages=tile.stages,
        capability=capability,
        interpret=interpret,
    )
    return y


def _with_aligned_halves(codes: jax.Array, half: int, *, halved: bool = False) -> jax.Array:
    """Codes `[n, inner]`, or `[n, ceil(inner / 2)]` if halved, with zeros after each half.

    None of the models' sizes needs them; an odd one costs a copy.
    """
    width = codes.shape[1] if halved else -(-codes.shape[1] // 2)
    parts = [codes[:, :width]] if halved else [codes[:, :width], codes[:, width:]]
    if all(part.shape[1] == half for part in parts):
        return codes
    return jnp.concatenate(
        [jnp.pad(part, ((0, 0), (0, half - part.shape[1]))) for part in parts], axis=1
    )
