"""W4A4 to W8A8 on Hopper (sm_90a): s8 wgmma into int32, all else in the same kernel.

Hopper has no int4 unit: fewer than 8 bits save memory here, not time.
"""

import jax
import jax.numpy as jnp

from kernels.chips import Chip
from kernels.hopper_kernel import Plan, build
from kernels.hopper_tiles import Tile, slab_columns, tiles
from kernels.operands import LONGEST_INT32_SUM, Product, Weight
from kernels.quantize_tokens import QuantizedTokens

# Codes travel to shared memory as pieces of 8 rows by the 128 bytes of a swizzle.
_PIECE_ROWS, _PIECE_BYTES = 8, 128


def layout(product: Product) -> str:
    """Both operands contiguous along the inputs, as 8-bit wgmma wants them."""
    del product
    return "columns"


def check(product: Product, chip: Chip | None = None) -> None:
    """Raises NotImplementedError for a product that this backend does not take.

    Every Hopper takes the same: the chip makes no difference.
    """
    del chip
    if not (2 <= product.weight_bits <= 8 and 2 <= product.act_bits <= 8):
        raise NotImplementedError(f"{product}: s8 wgmma holds codes of 2 to 8 bits")
    if jnp.dtype(product.out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"{product}: the Hopper kernel writes bfloat16 or float32")
    if product.inner > LONGEST_INT32_SUM:
        raise NotImplementedError(
            f"{product}: int32 may overflow past {LONGEST_INT32_SUM} inputs; use the XLA backend"
        )


def quantized_matmul(
    tokens: QuantizedTokens,
    weight: Weight,
    *,
    bits: tuple[int, int] = (8, 8),
    out_dtype: jnp.dtype,
    interpret: bool = False,
    tile: Tile | None = None,
) -> jax.Array:
    """`dequantized tokens @ dequantized weight + bias` on an H100 or H200.

    Integers accumulate exactly; corrections, scales and bias are float32 until the one cast. Tiles
    need not divide anything: TMA reads zeros beyond an end and writes nothing there. Operands whose
    sizes are no multiples of 8 rows, 128 inputs or 64 bytes of results are copied into padded ones.
    Of the models' sizes that is tokens only, where their number is no multiple of 8 (CogVideoX's
    226 of text, CogVideoX-2B's 17,550 of video in `proj_out`, CogVideoX1.5-5B's 45,106 in all of a
    block): a byte for each code is read and written once more, which at an H200's rates (4.8 TB/s,
    1979 TOPS) adds 13 % to a product with 3072 columns and 3 % to one with 12,288. Results have
    their own number of rows and are not copied.

    Args:
        tokens: codes int8 `[M, K]`, the statistics float32 `[M, 1]`.
        weight: codes int4 or int8 `[N, K]`; int4 is widened by XLA first, which costs 0.4 to
            1.7 % of the product (read once, written once).
        bits: of weights and activations; all of them go through int8.
        out_dtype: bfloat16 or float32.
        interpret: run on the CPU in Pallas' simulator of a GPU, which needs jax >= 0.11.
        tile: of `kernels.hopper_tiles`; None takes the one from the table.

    Returns:
        `[M, N]`.

    Raises:
        NotImplementedError: what `check` refuses, or interpret on an older jax.
    """
    (rows, inner), columns = tokens.codes.shape, weight.codes.shape[0]
    product = Product(rows, inner, columns, *bits, out_dtype)
    check(product)
    column_step = slab_columns(out_dtype)
    codes = _pad(tokens.codes, (_PIECE_ROWS, _PIECE_BYTES))
    weight_codes = _pad(weight.codes.astype(jnp.int8), (column_step, _PIECE_BYTES))
    of_rows = [tokens.scale, tokens.zero_point]
    of_columns = [weight.scale, weight.code_sum]
    if weight.zero_point is not None:
        of_rows.append(tokens.row_sum)
        of_columns.append(weight.zero_point)
    if weight.bias is not None:
        of_columns.append(weight.bias)
    of_rows = [_pad(x.reshape(rows).astype(jnp.float32), (_PIECE_ROWS,)) for x in of_rows]
    of_columns = [_pad(x.astype(jnp.float32), (column_step,)) for x in of_columns]
    plan = Plan(
        tile or tiles(product),
        inner,
        len(of_rows),
        len(of_columns),
        asymmetric=weight.zero_point is not None,
        biased=weight.bias is not None,
    )
    out = jax.ShapeDtypeStruct((rows, weight_codes.shape[0]), out_dtype)
    y = build(plan, out, interpret)(codes, weight_codes, *of_rows, *of_columns)
    return y[:, :columns]


def _pad(x: jax.Array, multiples: tuple[int, ...]) -> jax.Array:
    """Zeros at the ends of the axes; codes of 0 change no sum."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, widths) if any(end for _, end in widths) else x
