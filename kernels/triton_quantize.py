"""`quantize_tokens` for NVIDIA GPUs through jax-triton, alone or fused behind a norm or a GELU.

The tokens are read once, whatever stands in front of the codes and however many codes are made.
With IEEE's quotients and no contraction of a product and a sum, scales and codes are those of
`kernels.quantize_tokens`; behind a norm or a GELU they are those of its float32 value, which
another program may have rounded otherwise in the last bit.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels.quantize_tokens import QuantizedTokens
from kernels.triton_launch import compute_capability, launch, triton_module

# A chunk gives each thread 8 elements, 16 bytes of bfloat16; so many chunks fit its registers.
_MOST_CHUNKS = 9
_SMALLEST_BLOCK, _LARGEST_BLOCK = 256, 4096


class Clip(NamedTuple):
    """Multipliers of each token's minimum and maximum, broadcastable to float32 `[M, 1]`."""

    lower: jax.Array
    upper: jax.Array


def row_blocks(inner: int) -> tuple[int, int]:
    """Chunks of a row and their width, a power of two: the narrowest that needs few chunks.

    At the models' sizes at most 7 % of the lanes idle: 1536 = 6 x 256, 5120 = 5 x 1024,
    13824 < 7 x 2048.

    Raises:
        NotImplementedError: a row that does not fit one program's registers.
    """
    block = _SMALLEST_BLOCK
    while -(-inner // block) > _MOST_CHUNKS:
        block *= 2
    if block > _LARGEST_BLOCK:
        raise NotImplementedError(
            f"tokens of {inner}; the Triton quantizer keeps at most "
            f"{_MOST_CHUNKS * _LARGEST_BLOCK} elements in registers"
        )
    return -(-inner // block), block


def quantizer_constants(
    inner: int,
    *,
    count: int = 1,
    front: str = "none",
    affine: bool = False,
    rows_per_batch: int = 0,
    leading: int = 0,
    eps: float = 0.0,
    dtype: jnp.dtype = jnp.float32,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
) -> dict[str, Any]:
    """What the program is specialised to."""
    chunks, block = row_blocks(inner)
    return {
        "K": inner,
        "COUNT": count,
        "FRONT": front,
        "AFFINE": affine,
        "ROWS_PER_BATCH": rows_per_batch,
        "LEADING": leading,
        "EPS": eps,
        "BFLOAT16": front != "none" and jnp.dtype(dtype) == jnp.bfloat16,
        "INCLUDE_ZERO": include_zero,
        "CLIP_RATIO": clip_ratio,
        "CHUNKS": chunks,
        "BLOCK": block,
    }


def quantize_tokens(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    interpret: bool = False,
    capability: int | None = None,
) -> QuantizedTokens:
    """`kernels.quantize_tokens.quantize_tokens` of `x [M, K]` with a float32 range.

    Args:
        x: bfloat16 or float32 `[M, K]`.
        lower, upper: multipliers, broadcastable to `[M, 1]`.
        levels: `[]`, 2^bits - 1, at most 255.
        include_zero, clip_ratio: see `kernels.quantize_tokens.token_range`.
        interpret, capability: see `kernels.triton_matmul.quantized_matmul`.

    Raises:
        NotImplementedError: no triton, no jax-triton, no CUDA device from Ampere on, another dtype
            or too long a token; the message says which.
    """
    ranges = {"include_zero": include_zero, "clip_ratio": clip_ratio}
    clips, how = [Clip(lower, upper)], {"interpret": interpret, "capability": capability}
    return quantize_several(x, clips, levels, **ranges, **how)[0]


def quantize_several(
    x: jax.Array,
    clips: Sequence[Clip],
    levels: jax.Array,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    interpret: bool = False,
    capability: int | None = None,
) -> list[QuantizedTokens]:
    """`quantize_tokens` once for each of up to three clips, from one read of `x`.

    What q, k and v need: they see the same tokens through clips of their own.

    Raises:
        ValueError: no clip or more than three.
        NotImplementedError: as `quantize_tokens`.
    """
    constants = quantizer_constants(
        x.shape[1], count=len(clips), include_zero=include_zero, clip_ratio=clip_ratio
    )
    return _run(x, clips, levels, {}, constants, interpret=interpret, capability=capability)


def quantize_normalized(
    x: jax.Array,
    clips: Sequence[Clip],
    levels: jax.Array,
    *,
    eps: float,
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    scale: jax.Array | None = None,
    shift: jax.Array | None = None,
    rows_per_batch: int = 0,
    leading_rows: int = 0,
    dtype: jnp.dtype | None = None,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    interpret: bool = False,
    capability: int | None = None,
) -> list[QuantizedTokens]:
    """Codes of `(layer_norm(x) * weight + bias) * (1 + scale) + shift`, one for each clip.

    Three clips serve q, k and v, whose linears read the same tokens but clip them differently.

    Args:
        x: bfloat16 or float32 `[M, K]`, M = batch * rows_per_batch.
        clips: one to three.
        eps: of the norm, inside the root.
        weight, bias: float32 `[K]`, both or neither.
        scale, shift: float32 `[batch, K]`, both or neither; `[2 * batch, K]` if leading_rows > 0.
        rows_per_batch: tokens that share a row of scale and shift; needed with them.
        leading_rows: so many tokens at the start of each batch entry (CogVideoX: the text) take row
            2 b of scale and shift, the others 2 b + 1.
        dtype: what the norm's value is rounded to before it is quantized, as in the model where it
            is an array: bfloat16 or float32; x's own if None.

    Raises:
        ValueError: operands that do not go together.
        NotImplementedError: as `quantize_tokens`.
    """
    if (weight is None) != (bias is None) or (scale is None) != (shift is None):
        raise ValueError("weight goes with bias and scale with shift: give both or neither")
    groups = 0
    if scale is not None:
        groups = -(-x.shape[0] // rows_per_batch) if rows_per_batch > 0 else 0
        groups *= 2 if leading_rows else 1
        if scale.shape != (groups, x.shape[1]) or shift.shape != scale.shape:
            raise ValueError(
                f"scale {scale.shape} and shift {shift.shape} for {x.shape[0]} tokens, "
                f"rows_per_batch={rows_per_batch}, leading_rows={leading_rows}; "
                f"expected {(groups, x.shape[1])}"
            )
    constants = quantizer_constants(
        x.shape[1],
        count=len(clips),
        front="norm",
        affine=weight is not None,
        rows_per_batch=rows_per_batch if groups else 0,
        leading=leading_rows,
        eps=eps,
        dtype=dtype or x.dtype,
        include_zero=include_zero,
        clip_ratio=clip_ratio,
    )
    operands = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
    return _run(x, clips, levels, operands, constants, interpret=interpret, capability=capability)


def quantize_gelu(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    dtype: jnp.dtype | None = None,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    interpret: bool = False,
    capability: int | None = None,
) -> QuantizedTokens:
    """Codes of `gelu(x, approximate=True)`, computed in float32 and rounded to dtype (x's if None).

    The other arguments and errors are those of `quantize_tokens`.
    """
    constants = quantizer_constants(
        x.shape[1],
        front="gelu",
        dtype=dtype or x.dtype,
        include_zero=include_zero,
        clip_ratio=clip_ratio,
    )
    clips = [Clip(lower, upper)]
    return _run(x, clips, levels, {}, constants, interpret=interpret, capability=capability)[0]


def _run(x, clips, levels, operands, constants, *, interpret, capability) -> list[QuantizedTokens]:
    if not 1 <= len(clips) <= 3:
        raise ValueError(f"{len(clips)} clips; expected 1 to 3")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"tokens in {x.dtype}; the Triton quantizer reads bf16 and f32")
    program = triton_module("triton_quantize_program").quantize_tokens_program
    if capability is None and not interpret:
        capability = compute_capability()
    rows, count = x.shape[0], len(clips)

    def of_rows(multipliers):
        columns = [jnp.broadcast_to(m, (rows, 1)).astype(jnp.float32)[:, 0] for m in multipliers]
        return jnp.stack(columns)

    levels = jnp.asarray(levels, jnp.float32).reshape(1)
    # Absent operands need an address all the same.
    optional = [operands.get(name) for name in ("weight", "bias", "scale", "shift")]
    arguments = [
        x,
        of_rows([clip.lower for clip in clips]),
        of_rows([clip.upper for clip in clips]),
        levels,
        *(levels if a is None else a.astype(jnp.float32) for a in optional),
        rows,
    ]
    codes = [jax.ShapeDtypeStruct(x.shape if i < count else (1,), jnp.int8) for i in range(3)]
    *codes, statistics = launch(
        program,
        arguments,
        [*codes, jax.ShapeDtypeStruct((count, 3, rows), jnp.float32)],
        constants,
        grid=rows,
        warps=constants["BLOCK"] // 256,
        stages=1,
        capability=capability,
        interpret=interpret,
    )
    return [
        QuantizedTokens(codes[i], *(statistics[i, j][:, None] for j in range(3)))
        for i in range(count)
    ]
