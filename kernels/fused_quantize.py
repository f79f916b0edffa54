"""Tokens quantized where they are made: for several linears, behind a norm, behind a GELU.

On a GPU each is one kernel that reads its tokens once. Elsewhere, and where that kernel does not
take a call, they are what stands here: XLA fuses it as far as it can.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kernels import triton_quantize
from kernels.choose import say_once
from kernels.partition import automatic_axes
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from kernels.reference import at_least_float32

GPU_BACKENDS = ("hopper", "triton")
"""Backends of products whose tokens the Triton quantizers make."""

Clips = Sequence[tuple[jax.Array, jax.Array]]
"""Of each linear that reads the tokens: its multipliers of minimum and maximum."""


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
    """LayerNorm without parameters over the last axis; always in float32, returns float32."""
    x = at_least_float32(x)
    centred = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centred).mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + eps)


@dataclass(frozen=True)
class Normalized:
    """Tokens behind a LayerNorm, kept as what they are made of: a quantizer may be faster so.

    They are `(layer_norm(x) * weight + bias) * (1 + scale) + shift`, all in float32, in dtype.

    Attributes:
        x: `[batch, tokens, in]`.
        eps: of the norm, inside the root.
        dtype: what the result is rounded to.
        weight, bias: `[in]`, both or neither.
        scale, shift: float32 `[batch, 1, in]`, both or neither; `[batch, 2, in]` with leading_rows.
        leading_rows: if not 0, so many tokens at the start of each sample (CogVideoX: the text)
            take the first of two scales and shifts, the others the second.
    """

    x: jax.Array
    eps: float
    dtype: jnp.dtype
    weight: jax.Array | None = None
    bias: jax.Array | None = None
    scale: jax.Array | None = None
    shift: jax.Array | None = None
    leading_rows: int = 0

    def values(self) -> jax.Array:
        """The tokens, `[batch, tokens, in]` in dtype."""
        y = layer_norm(self.x, self.eps)
        if self.weight is not None:
            y = y * at_least_float32(self.weight) + at_least_float32(self.bias)
        if self.scale is not None:
            y = y * (1 + self.per_token(self.scale)) + self.per_token(self.shift)
        return y.astype(self.dtype)

    def per_token(self, parts: jax.Array) -> jax.Array:
        """`[batch, 1 or 2, in]` so that it broadcasts against the tokens."""
        if not self.leading_rows:
            return parts
        leads = jnp.arange(self.x.shape[1])[:, None] < self.leading_rows
        return jnp.where(leads, parts[:, :1], parts[:, 1:])


def quantize_several(
    x: jax.Array, clips: Clips, levels: jax.Array, *, backend: str = "xla", **ranges
) -> list[QuantizedTokens]:
    """The same tokens once for each of up to three linears: q, k and v have clips of their own.

    Args:
        x: `[batch, ..., in]`.
        clips: of each linear.
        levels: `[]`, 2^bits - 1.
        backend: of the products that they are for.
        ranges: `include_zero`, `clip_ratio` and `range_dtype` of `quantize_tokens`.
    """
    return _front(x, clips, levels, backend, ranges, triton_quantize.quantize_several, lambda: x)


def quantize_normalized(
    tokens: Normalized, clips: Clips, levels: jax.Array, *, backend: str = "xla", **ranges
) -> list[QuantizedTokens]:
    """Codes of `tokens.values()`, one set for each clip; clips and the others: `quantize_several`.

    On a GPU the norm is computed on the way: its values are never written to memory.
    """
    x, scale, shift = tokens.x, tokens.scale, tokens.shift

    def kernel(flat: jax.Array, *arguments, **more) -> list[QuantizedTokens]:
        norm = {"weight": tokens.weight, "bias": tokens.bias, "eps": tokens.eps}
        if scale is not None:
            norm |= {"scale": scale.reshape(-1, x.shape[-1]), "rows_per_batch": x.shape[1]}
            norm |= {"shift": shift.reshape(-1, x.shape[-1]), "leading_rows": tokens.leading_rows}
        return triton_quantize.quantize_normalized(
            flat, *arguments, dtype=tokens.dtype, **norm, **more
        )

    return _front(x, clips, levels, backend, ranges, kernel, tokens.values)


def quantize_gelu(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    *,
    backend: str = "xla",
    **ranges,
) -> QuantizedTokens:
    """Codes of `gelu(x)`, the tanh approximation, computed in float32 and rounded to x's dtype.

    Args:
        x: `[batch, ..., in]`.
        lower, upper: multipliers of minimum and maximum, see `quantize_tokens`.
        levels, backend, ranges: see `quantize_several`.
    """

    def kernel(flat: jax.Array, clips, *arguments, **more) -> list[QuantizedTokens]:
        return [triton_quantize.quantize_gelu(flat, *clips[0], *arguments, **more)]

    return _front(x, [(lower, upper)], levels, backend, ranges, kernel, lambda: gelu(x))[0]


def gelu(x: jax.Array) -> jax.Array:
    """The tanh approximation, computed in float32 as PyTorch's kernels do, in x's dtype."""
    return jax.nn.gelu(at_least_float32(x), approximate=True).astype(x.dtype)


def per_row(clip: jax.Array, x: jax.Array) -> jax.Array:
    """A multiplier, broadcastable to `[batch, ..., 1]` of `x [batch, ..., in]`, as `[rows, 1]`."""
    return jnp.broadcast_to(clip, (*x.shape[:-1], 1)).reshape(-1, 1)


def _front(
    x: jax.Array,
    clips: Clips,
    levels: jax.Array,
    backend: str,
    ranges: dict,
    kernel: Callable[..., list[QuantizedTokens]],
    value: Callable[[], jax.Array],
) -> list[QuantizedTokens]:
    """What `kernel` makes of flat rows; of `value()` where it does not take them."""
    kept = {key: each for key, each in ranges.items() if key != "range_dtype"}
    wide = jnp.dtype(ranges.get("range_dtype", jnp.float32)) == jnp.float32
    if backend in GPU_BACKENDS and wide:
        rows = [triton_quantize.Clip(*(per_row(clip, x) for clip in pair)) for pair in clips]
        try:
            if math.prod(automatic_axes().values()) > 1:
                raise NotImplementedError("its kernel is not spread over several devices yet")
            found = kernel(x.reshape(-1, x.shape[-1]), rows, levels, **kept)
            return jax.tree.map(lambda y: y.reshape(*x.shape[:-1], y.shape[-1]), found)
        except NotImplementedError as reason:
            say_once(f"XLA quantizes tokens of {x.shape[-1]}: {reason}")
    made = value()
    return [quantize_tokens(made, *pair, levels, **ranges) for pair in clips]
