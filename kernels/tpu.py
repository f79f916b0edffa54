"""Low-bit products on TPU, in Pallas: int4 on the matrix units of v5e, v5p and v6e, fp8 on TPU7x.

XLA turns a dot of int4 into `vmatmul.s8` on v5 and v6, at half the rate, and any dot of integers
into `vmatmul.f32` on TPU7x. Here the codes reach the unit as they are: `vmatmul.s4`, or as
float8_e4m3, which holds the integers up to 16 exactly. Rows of tokens stay in VMEM while all the
weight's columns pass by; both zero points, scales and bias are applied before the result leaves.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.chips import Chip
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.target import target
from kernels.tpu_fused import quantize_strip, strip_scalars
from kernels.tpu_tiles import LANES, STRIP, VMEM, Tile, round_up, tiles

# What a dot of each type accumulates in.
_ACCUMULATE = {
    "int4": jnp.int32,
    "int8": jnp.int32,
    "float8_e4m3fn": jnp.float32,
    "bfloat16": jnp.float32,
}
_EXACT_IN_FLOAT32 = 2**24


def layout(product: Product) -> str:
    """Codes `[in, out]`, int4 up to 4 bits."""
    del product
    return "rows"


def dot_dtype(product: Product, chip: Chip) -> jnp.dtype:
    """The type in which a chip multiplies the codes.

    TPU7x has no integer unit. Its accumulator is float32, exact while every partial sum stays
    below 2^24: up to in = 262144 at 4 bits each, 16384 at W4A8, 1024 at W8A8.

    Raises:
        NotImplementedError: another chip, or sums that float32 does not hold.
    """
    if chip.name not in VMEM:
        raise NotImplementedError(f"no kernel for {chip.name}; there is for {', '.join(VMEM)}")
    bits = (product.weight_bits, product.act_bits)
    if chip.int8:
        return jnp.dtype(jnp.int4 if max(bits) <= 4 else jnp.int8)
    largest = _EXACT_IN_FLOAT32 >> (sum(bits) - 2)
    if product.inner > largest:
        raise NotImplementedError(
            f"{chip.name} adds in float32, exact at W{bits[0]}A{bits[1]} up to in={largest}, "
            f"not {product.inner}"
        )
    # e4m3 has four significant bits: 5-bit codes, -16 to 15, still fit.
    return jnp.dtype(jnp.float8_e4m3fn if max(bits) <= 5 else jnp.bfloat16)


def check(product: Product, chip: Chip | None = None) -> None:
    """Refuses what the kernels cannot take.

    Args:
        product: its `rows` may be unknown.
        chip: `kernels.target` if None; only what holds for all TPUs is asked where that is none.

    Raises:
        NotImplementedError: bits outside 2..8, another output type, a chip without a kernel, sums
            that are not exact, or rows too long for VMEM.
    """
    bits = (product.weight_bits, product.act_bits)
    if min(bits) < 2 or max(bits) > 8:
        raise NotImplementedError(f"W{bits[0]}A{bits[1]}: expected 2 to 8 bits")
    if jnp.dtype(product.out_dtype) not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(
            f"out_dtype={jnp.dtype(product.out_dtype).name}; expected bfloat16 or float32"
        )
    chip = target() if chip is None else chip
    if chip.platform == "tpu":
        tiles(product, chip.name, dot_dtype(product, chip))


def quantized_matmul(
    tokens: QuantizedTokens,
    weight: Weight,
    *,
    bits: tuple[int, int] | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    interpret: bool = False,
    tile: Tile | None = None,
    chip: Chip | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`dequantized tokens @ dequantized weights + bias`, the integers exact (`kernels.xla`).

    Args:
        tokens: codes `[rows, in]` and their statistics `[rows, 1]`.
        weight: codes `[in, out]`, int4 or int8, and their statistics `[out]`.
        bits: of weights and activations; what their containers hold if None, so that int8 codes of
            tokens are then multiplied at the rate of int8.
        out_dtype: bfloat16 or float32.
        interpret: run as plain JAX on any device; dots are int8 then, for want of int4 ones.
        tile: `kernels.tpu_tiles.tiles` chooses if None.
        chip: what to compile for; `kernels.target` if None.
        dtype: of the dot, `dot_dtype` chooses if None.

    Returns:
        `[rows, out]`.

    Raises:
        NotImplementedError: see `check`.
    """
    rows, inner = tokens.codes.shape
    bits = bits or (_container_bits(weight.codes), _container_bits(tokens.codes))
    product = Product(rows, inner, weight.codes.shape[1], *bits, jnp.dtype(out_dtype))
    chip, dtype = _target(product, chip, dtype, interpret)
    tile = tile or tiles(product, chip.name, dtype)
    padded = round_up(inner, LANES)
    codes = jnp.pad(tokens.codes.astype(jnp.int8), ((0, 0), (0, padded - inner)))
    statistics = jnp.concatenate([tokens.scale, tokens.zero_point, tokens.row_sum], axis=1)
    return _call(
        "quantized_matmul",
        partial(_codes_kernel, finish=_finish(product, weight), tile=tile, dtype=dtype),
        [(codes, padded), (statistics.astype(jnp.float32), 3)],
        [] if dtype == jnp.int8 else [pltpu.VMEM((tile.rows, padded), dtype)],
        weight,
        product,
        tile,
        chip,
        interpret,
    )


def quantize_and_matmul(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    weight: Weight,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    bits: tuple[int, int] = (4, 4),
    out_dtype: jnp.dtype = jnp.bfloat16,
    interpret: bool = False,
    tile: Tile | None = None,
    chip: Chip | None = None,
    dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`quantized_matmul` of tokens that are quantized in VMEM and never written to memory.

    A block of rows is quantized before its first block of columns and kept for the others, in
    float32 and with the same codes as `quantize_tokens`.

    Args:
        x: `[rows, in]`, bfloat16 or float32.
        lower, upper: multipliers of minimum and maximum, `[]` or `[rows, 1]`.
        levels: `[]`, 2^bits - 1 of the activations.
        weight: codes `[in, out]`, int4 or int8, and their statistics `[out]`.
        include_zero, clip_ratio: see `kernels.quantize_tokens.token_range`.

    The others, and what is returned and raised, are as in `quantized_matmul`.
    """
    rows, inner = x.shape
    product = Product(rows, inner, weight.codes.shape[1], *bits, jnp.dtype(out_dtype))
    chip, dtype = _target(product, chip, dtype, interpret)
    tile = tile or tiles(product, chip.name, dtype, x.dtype)
    padded = round_up(inner, LANES)
    # A repeated end moves neither minimum nor maximum; what it adds to the row sum is taken off.
    x = jnp.pad(x, ((0, 0), (0, padded - inner)), mode="edge")
    clips = [jnp.broadcast_to(clip, (rows, 1)).astype(jnp.float32) for clip in (lower, upper)]
    scalars = strip_scalars(levels)
    quantize = partial(
        quantize_strip, include_zero=include_zero, clip_ratio=clip_ratio, padding=padded - inner
    )
    finish = _finish(product, weight)
    return _call(
        "quantize_and_matmul",
        partial(_fused_kernel, quantize=quantize, finish=finish, tile=tile, dtype=dtype),
        [(x, padded), (jnp.concatenate(clips, axis=1), 2)],
        [pltpu.VMEM((tile.rows, padded), dtype), pltpu.VMEM((tile.rows, 3), jnp.float32)],
        weight,
        product,
        tile,
        chip,
        interpret,
        [scalars],
    )


def _container_bits(codes: jax.Array) -> int:
    return 4 if codes.dtype == jnp.int4 else 8


def _target(
    product: Product, chip: Chip | None, dtype: jnp.dtype | None, interpret: bool
) -> tuple[Chip, jnp.dtype]:
    chip = target() if chip is None else chip
    check(product, chip)
    if dtype is None:
        dtype = jnp.int8 if interpret else dot_dtype(product, chip)
    return chip, jnp.dtype(dtype)


def _call(
    name, kernel, by_row, scratch, weight, product, tile, chip, interpret, scalars=()
) -> jax.Array:
    """The grid: blocks of rows, and for each all blocks of columns, one after the other."""
    padded = by_row[0][1]
    codes = jnp.pad(weight.codes, ((0, padded - product.inner), (0, 0)))
    zeros = jnp.zeros_like(weight.scale)
    channels = [weight.scale, weight.zero_point, weight.code_sum, weight.bias]
    channels = jnp.stack([zeros if c is None else c for c in channels]).astype(jnp.float32)
    columns = tile.columns
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(product.rows, tile.rows), pl.cdiv(product.columns, columns)),
        in_specs=[
            *(pl.BlockSpec((tile.rows, width), lambda i, j: (i, 0)) for _, width in by_row),
            pl.BlockSpec((padded, columns), lambda i, j: (0, j)),
            pl.BlockSpec((4, columns), lambda i, j: (0, j)),
            *(pl.BlockSpec(memory_space=pltpu.SMEM) for _ in scalars),
        ],
        out_specs=pl.BlockSpec((tile.rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((product.rows, product.columns), product.out_dtype),
        scratch_shapes=scratch,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=VMEM.get(chip.name, 0) * 7 // 8 or None,
        ),
        interpret=interpret,
        name=name,
    )(*(array for array, _ in by_row), codes, channels, *scalars)


def _codes_kernel(
    tokens_ref, statistics_ref, weight_ref, channels_ref, out_ref, *scratch, **how
) -> None:
    codes_ref = tokens_ref
    if scratch:
        (codes_ref,) = scratch

        # Once a block of rows, as int4 in the layout of memory would be laid out anew each time.
        @_strips_of_first_columns(codes_ref.shape[0])
        def _(rows):
            codes_ref[rows, :] = tokens_ref[rows, :].astype(codes_ref.dtype)

    _multiply(codes_ref, statistics_ref[...], weight_ref, channels_ref, out_ref, **how)


def _fused_kernel(
    x_ref, clips_ref, weight_ref, channels_ref, scalars_ref, out_ref, codes_ref, statistics_ref, *,
    quantize, **how,
) -> None:  # fmt: skip
    # In strips: a whole block in float32 would not fit beside the rest.
    @_strips_of_first_columns(codes_ref.shape[0])
    def _(rows):
        codes, statistics = quantize(x_ref[rows, :], clips_ref[rows, :], scalars_ref)
        codes_ref[rows, :] = codes.astype(codes_ref.dtype)
        statistics_ref[rows, :] = statistics

    _multiply(codes_ref, statistics_ref[...], weight_ref, channels_ref, out_ref, **how)


def _strips_of_first_columns(size: int):
    """Decorates what is done with every strip of a block of rows, at its first columns."""

    def run(body) -> None:
        @pl.when(pl.program_id(1) == 0)
        def _():
            @pl.loop(0, size, step=STRIP)
            def _(start):
                body(pl.ds(pl.multiple_of(start, STRIP), STRIP))

    return run


def _multiply(codes_ref, statistics, weight_ref, channels_ref, out_ref, *, finish, tile, dtype):
    @pl.loop(0, tile.columns, step=tile.slice, unroll=tile.slice == tile.columns)
    def _(start):
        columns = pl.ds(pl.multiple_of(start, tile.slice), tile.slice)
        accumulated = jax.lax.dot(
            codes_ref[...],
            weight_ref[:, columns].astype(dtype),
            preferred_element_type=_ACCUMULATE[dtype.name],
        )
        out_ref[:, columns] = finish(accumulated, statistics, channels_ref[:, columns])


def _finish(product: Product, weight: Weight):
    """The corrections, in the order of `kernels.xla`."""
    has_zero_point, has_bias = weight.zero_point is not None, weight.bias is not None

    def finish(accumulated: jax.Array, statistics: jax.Array, channels: jax.Array) -> jax.Array:
        scale, a, row_sum = (statistics[:, n : n + 1] for n in range(3))
        channel_scale, w, code_sum, bias = (channels[n : n + 1] for n in range(4))
        centered = accumulated.astype(jnp.float32) - a * code_sum
        if has_zero_point:
            centered = centered - w * row_sum + product.inner * a * w
        y = scale * channel_scale * centered
        return (y + bias if has_bias else y).astype(product.out_dtype)

    return finish
