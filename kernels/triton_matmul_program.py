"""The Triton program of `kernels.triton_matmul`. Importing it needs triton.

The weights are the *first* operand of the tensor cores, `[columns, inner] @ [inner, rows]`, and the
result is transposed on its way out. First operands come from registers on every chip, Hopper
included, so that unpacked weights never go back to shared memory; with the operands in their usual
order the loop has about twice the instructions on Ampere.

Two codes of four bits are unpacked together, four bytes at a time: `byte << 4` and `byte & 0xF0`
are sixteen times the code of the low and of the high nibble as an int8, and the sixteenth is taken
from the accumulator. Halves of the inner axis in
place of neighbours in a byte spare the shuffle.
"""

import triton
import triton.language as tl

# $0, $1: sixteen times the low and the high codes of the four bytes in $2.
UNPACK_ASSEMBLY = """{
.reg .b32 shifted;
shl.b32 shifted, $2, 4;
and.b32 $0, shifted, 0xF0F0F0F0;
and.b32 $1, $2, 0xF0F0F0F0;
}"""
_UNPACK = tl.constexpr(UNPACK_ASSEMBLY)


@triton.jit
def _sixteenfold_codes(packed, ASSEMBLY: tl.constexpr):
    """int8 bytes to the codes in their low and high nibbles, both times 16."""
    if ASSEMBLY:
        # One register of four bytes at a time; from `<<` and `&` LLVM would treat every byte alone.
        low, high = tl.inline_asm_elementwise(
            _UNPACK, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    else:
        low, high = packed << 4, packed & -16
    return low, high


@triton.jit
def _tile_of(program, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """Row and column of a program's tile: GROUP rows of tiles at a time, so that L2 serves them."""
    in_group = GROUP * TILES_N
    first = (program // in_group) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def quantized_matmul_program(
    codes_ptr,
    scale_ptr,
    zero_ptr,
    sum_ptr,
    w_codes_ptr,
    w_scale_ptr,
    w_zero_ptr,
    w_sum_ptr,
    bias_ptr,
    hidden_ptr,
    left_ptr,
    M,
    y_ptr,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    HALVED: tl.constexpr,
    ASYMMETRIC: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """One tile `[BLOCK_M, BLOCK_N]` of `kernels.triton_matmul.quantized_matmul`, `y [M, N]`.

    codes int8 `[M, 2 HALF]`, scale, zero point and sum float32 `[M]`; w_codes int8 `[N, HALF]`
    (HALVED) or `[N, 2 HALF]`, w_scale, w_zero, w_sum and bias float32 `[N]`; hidden `[M, RANK]` and
    left `[N, RANK]`. HALF is a multiple of 16, so that every load is 16 bytes wide, at least K / 2,
    and filled with zeros. Sizes of the weights are constants: of a number passed at run time
    jax-triton does not tell Triton what it is divisible by.
    """
    W_WIDTH: tl.constexpr = HALF if HALVED else 2 * HALF
    EVEN: tl.constexpr = HALF % BLOCK_K == 0
    tile_m, tile_n = _tile_of(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), (N + BLOCK_N - 1) // BLOCK_N, GROUP
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Beyond the end the last row is read again: cheaper than a mask in the loop.
    row = tl.minimum(rows, M - 1).to(tl.int64)
    column = tl.minimum(columns, N - 1)
    inner = tl.arange(0, BLOCK_K)
    a_ptrs = codes_ptr + row[None, :] * (2 * HALF) + inner[:, None]
    w_ptrs = w_codes_ptr + column[:, None] * W_WIDTH + inner[None, :]
    accumulated = tl.zeros((BLOCK_N, BLOCK_M), tl.int32)
    # Both halves of the inner axis at once, whole bytes too: with a single product in the loop
    # Triton for Ampere would carry operands to the next step byte by byte.
    for start in range(0, HALF, BLOCK_K):
        if EVEN:
            a_low, a_high = tl.load(a_ptrs), tl.load(a_ptrs + HALF)
            w_low = tl.load(w_ptrs)
        else:
            left_over = inner < HALF - start
            a_low = tl.load(a_ptrs, mask=left_over[:, None], other=0)
            a_high = tl.load(a_ptrs + HALF, mask=left_over[:, None], other=0)
            w_low = tl.load(w_ptrs, mask=left_over[None, :], other=0)
        if HALVED:
            w_low, w_high = _sixteenfold_codes(w_low, ASSEMBLY)
        elif EVEN:
            w_high = tl.load(w_ptrs + HALF)
        else:
            w_high = tl.load(w_ptrs + HALF, mask=left_over[None, :], other=0)
        accumulated = tl.dot(w_low, a_low, accumulated, out_dtype=tl.int32)
        accumulated = tl.dot(w_high, a_high, accumulated, out_dtype=tl.int32)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K

    product = accumulated.to(tl.float32)
    if HALVED:
        product = product * 0.0625
    scale = tl.load(scale_ptr + row)[None, :]
    zero = tl.load(zero_ptr + row)[None, :]
    w_scale = tl.load(w_scale_ptr + column)[:, None]
    w_sum = tl.load(w_sum_ptr + column)[:, None]
    centered = product - zero * w_sum
    if ASYMMETRIC:
        code_sum = tl.load(sum_ptr + row)[None, :]
        w_zero = tl.load(w_zero_ptr + column)[:, None]
        centered = centered - w_zero * code_sum + K * zero * w_zero
    y = scale * w_scale * centered
    if BIAS:
        y = y + tl.load(bias_ptr + column)[:, None]
    if RANK > 0:
        ranks = tl.arange(0, BLOCK_R)
        hidden = tl.load(
            hidden_ptr + row[None, :] * RANK + ranks[:, None], mask=ranks[:, None] < RANK, other=0
        )
        left = tl.load(
            left_ptr + column[:, None] * RANK + ranks[None, :], mask=ranks[None, :] < RANK, other=0
        )
        y = tl.dot(left, hidden, y, input_precision="ieee")
    tl.store(
        y_ptr + rows.to(tl.int64)[:, None] * N + columns[None, :],
        tl.trans(y).to(y_ptr.dtype.element_ty),
        mask=(rows[:, None] < M) & (columns[None, :] < N),
    )
