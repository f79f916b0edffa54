"""The Triton program of `kernels.triton_quantize`. Importing it needs triton.

A program owns one row and keeps it in registers from the one read to the codes, as a few equal
chunks: a single block would have to be a power of two, 8192 wide for a token of 5120.
"""

import triton
import triton.language as tl

# Adding it rounds a float32 below 2^22 to an integer, half to even, in the low bits of the result.
_ROUND = tl.constexpr(1.5 * 2.0**23)
_ROUND_BITS = tl.constexpr(0x4B400000)
_SMALLEST_SCALE = tl.constexpr(1e-9)
_GELU = tl.constexpr(-2 * 0.7978845608028654)


@triton.jit
def _nan_minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _load(ptr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, OTHER: tl.constexpr):
    """One chunk of a row as float32; OTHER beyond its end."""
    inner = CHUNK * BLOCK + tl.arange(0, BLOCK)
    if (CHUNK + 1) * BLOCK <= K:
        values = tl.load(ptr + inner)
    else:
        values = tl.load(ptr + inner, mask=inner < K, other=OTHER)
    return values.to(tl.float32)


@triton.jit
def _ended(values, CHUNK: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, OTHER: tl.constexpr):
    """The chunk with OTHER beyond the row's end."""
    if (CHUNK + 1) * BLOCK > K:
        values = tl.where(CHUNK * BLOCK + tl.arange(0, BLOCK) < K, values, OTHER)
    return values


@triton.jit
def _normalized(chunks, eps, BLOCK: tl.constexpr, K: tl.constexpr):
    """LayerNorm without parameters: the mean first, then the variance of what is left."""
    total = chunks[0]
    for c in tl.static_range(1, len(chunks)):
        total += chunks[c]
    mean = tl.div_rn(tl.sum(total, 0), 1.0 * K)
    centred = ()
    squares = tl.zeros((BLOCK,), tl.float32)
    for c in tl.static_range(len(chunks)):
        centred += (_ended(chunks[c] - mean, c, BLOCK, K, 0.0),)
        squares += centred[c] * centred[c]
    variance = tl.div_rn(tl.sum(squares, 0), 1.0 * K)
    factor = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
    y = ()
    for c in tl.static_range(len(chunks)):
        y += (centred[c] * factor,)
    return y


@triton.jit
def _quotient(x, divisor, inverse):
    """IEEE's `x / divisor` in five operations, of the divisor's correctly rounded inverse.

    A general division takes a dozen and a branch. The first remainder makes the quotient faithful
    (off by less than its last bit), from which the second makes it the nearest: Markstein,
    Computation of elementary functions on the IBM RISC System/6000, 1990. Quotients so small that a
    remainder underflows round to the code of zero in any case.
    """
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-divisor, quotient, x), inverse, quotient)
    return tl.fma(tl.fma(-divisor, quotient, x), inverse, quotient)


@triton.jit
def _encode(
    chunks,
    codes_ptr,
    scale,
    zero,
    levels,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
    K: tl.constexpr,
):
    """Stores a row's codes and returns their sum.

    Clipped before it is rounded, which is the same since both ends are integers. The offset from
    the unsigned to the signed code is added after rounding: an odd one would turn ties around.
    """
    offset = (levels + 1) * 0.5
    shift = (zero - offset).to(tl.int32) - _ROUND_BITS
    inverse = tl.div_rn(1.0, scale)
    total = tl.zeros((BLOCK,), tl.int32)
    for c in tl.static_range(CHUNKS):
        steps = _quotient(chunks[c], scale, inverse)
        steps = tl.minimum(tl.maximum(steps, -zero), levels - zero)
        codes = (steps + _ROUND).to(tl.int32, bitcast=True) + shift
        inner = c * BLOCK + tl.arange(0, BLOCK)
        if (c + 1) * BLOCK <= K:
            tl.store(codes_ptr + inner, codes.to(tl.int8))
        else:
            tl.store(codes_ptr + inner, codes.to(tl.int8), mask=inner < K)
        total += _ended(codes, c, BLOCK, K, 0)
    return tl.sum(total, 0)


@triton.jit
def quantize_tokens_program(
    x_ptr,
    lower_ptr,
    upper_ptr,
    levels_ptr,
    weight_ptr,
    bias_ptr,
    modulation_ptr,
    shift_ptr,
    M,
    codes_ptr,
    second_ptr,
    third_ptr,
    statistics_ptr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    FRONT: tl.constexpr,
    AFFINE: tl.constexpr,
    ROWS_PER_BATCH: tl.constexpr,
    LEADING: tl.constexpr,
    EPS: tl.constexpr,
    BFLOAT16: tl.constexpr,
    INCLUDE_ZERO: tl.constexpr,
    CLIP_RATIO: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row of `kernels.triton_quantize`: x `[M, K]` to COUNT times codes int8 `[M, K]`.

    lower, upper float32 `[COUNT, M]`; levels float32 `[1]`; weight, bias float32 `[K]` (AFFINE);
    modulation, shift float32 `[groups, K]` (ROWS_PER_BATCH > 0); statistics float32
    `[COUNT, 3, M]`: scale, zero point, sum of the codes. FRONT is "none", "norm" or "gelu".
    """
    row = tl.program_id(0)
    x_row = x_ptr + row.to(tl.int64) * K
    chunks = ()
    for c in tl.static_range(CHUNKS):
        chunks += (_load(x_row, c, BLOCK, K, 0.0),)
    if FRONT == "norm":
        chunks = _normalized(chunks, EPS, BLOCK, K)
        if ROWS_PER_BATCH > 0:
            group = row // ROWS_PER_BATCH
            if LEADING > 0:
                group = 2 * group + (row % ROWS_PER_BATCH >= LEADING).to(tl.int32)
            modulation_ptr += group.to(tl.int64) * K
            shift_ptr += group.to(tl.int64) * K
    ready = ()
    for c in tl.static_range(CHUNKS):
        y = chunks[c]
        if FRONT == "gelu":
            # x (1 + tanh(u)) / 2 is x sigmoid(2 u), without a tanh.
            y = y / (1 + tl.exp((y + 0.044715 * y * y * y) * _GELU))
        if FRONT == "norm":
            if AFFINE:
                y = y * _load(weight_ptr, c, BLOCK, K, 0.0) + _load(bias_ptr, c, BLOCK, K, 0.0)
            if ROWS_PER_BATCH > 0:
                y = y * (1 + _load(modulation_ptr, c, BLOCK, K, 0.0))
                y += _load(shift_ptr, c, BLOCK, K, 0.0)
        if BFLOAT16:
            y = y.to(tl.bfloat16, fp_downcast_rounding="rtne").to(tl.float32)
        ready += (y,)

    low = _ended(ready[0], 0, BLOCK, K, float("inf"))
    high = _ended(ready[0], 0, BLOCK, K, -float("inf"))
    for c in tl.static_range(1, CHUNKS):
        low = _nan_minimum(low, _ended(ready[c], c, BLOCK, K, float("inf")))
        high = _nan_maximum(high, _ended(ready[c], c, BLOCK, K, -float("inf")))
    low, high = tl.reduce(low, 0, _nan_minimum), tl.reduce(high, 0, _nan_maximum)
    if INCLUDE_ZERO:
        low, high = tl.where(low > 0, 0.0, low), tl.where(high < 0, 0.0, high)
    if CLIP_RATIO != 1.0:
        low, high = low * CLIP_RATIO, high * CLIP_RATIO
    levels = tl.load(levels_ptr)
    for i in tl.static_range(COUNT):
        lowest = tl.load(lower_ptr + i * M + row) * low
        highest = tl.load(upper_ptr + i * M + row) * high
        scale = tl.div_rn(highest - lowest, levels)
        scale = tl.where(scale < _SMALLEST_SCALE, _SMALLEST_SCALE, scale)
        zero = tl.minimum(tl.maximum(-tl.div_rn(lowest, scale), 0.0), levels)
        zero = (zero + _ROUND) - _ROUND
        if i == 0:
            row_ptr = codes_ptr
        elif i == 1:
            row_ptr = second_ptr
        else:
            row_ptr = third_ptr
        row_ptr += row.to(tl.int64) * K
        total = _encode(ready, row_ptr, scale, zero, levels, CHUNKS, BLOCK, K)
        statistics = statistics_ptr + 3 * i * M + row
        tl.store(statistics, scale)
        tl.store(statistics + M, zero - (levels + 1) * 0.5)
        tl.store(statistics + 2 * M, total.to(tl.float32))
