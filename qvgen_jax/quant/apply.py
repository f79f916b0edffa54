"""Linears applied where their tokens are made, so that a GPU quantizes them in the same kernel.

Everywhere else each linear quantizes for itself: XLA fuses that into what makes the tokens, and a
TPU does it in the product's prologue.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from kernels.fused_quantize import (
    GPU_BACKENDS,
    Normalized,
    gelu,
    quantize_gelu,
    quantize_normalized,
    quantize_several,
)
from kernels.quantize_tokens import QuantizedTokens
from qvgen_jax.quant.dense import QuantContext
from qvgen_jax.quant.packed_dense import PackedDense
from qvgen_jax.quant.rotation import rotate


def apply_each(layers: Sequence[nnx.Module], x: jax.Array, ctx: QuantContext) -> list[jax.Array]:
    """Several linears of the same tokens `x [batch, ..., in]`: q, k and v."""
    if not _quantize_together(layers):
        return [layer(x, ctx) for layer in layers]
    x = rotate(x, layers[0].block)
    clips, how = _clips(layers, x, ctx)
    return _multiply(layers, quantize_several(x, clips, **how), ctx)


def apply_normalized(
    layers: Sequence[nnx.Module], tokens: Normalized, ctx: QuantContext
) -> list[jax.Array]:
    """Linears of the same tokens behind a norm `[batch, tokens, in]`.

    Smoothing and rotation come between norm and codes, and a branch may read what is not codes:
    such layers get the norm's values.
    """
    if not _quantize_together(layers) or layers[0].block > 1:
        return apply_each(layers, tokens.values(), ctx)
    clips, how = _clips(layers, jax.ShapeDtypeStruct(tokens.x.shape, tokens.dtype), ctx)
    return _multiply(layers, quantize_normalized(tokens, clips, **how), ctx)


def apply_to_gelu(layer: nnx.Module, x: jax.Array, ctx: QuantContext) -> jax.Array:
    """`layer(gelu(x))` of `x [batch, ..., in]`, the tanh approximation."""
    if not _quantize_together([layer]) or layer.block > 1:
        return layer(gelu(x), ctx)
    arguments = layer.clip_arguments(x, ctx)
    return layer(quantize_gelu(x, backend=layer.backend, **arguments), ctx)


def _quantize_together(layers: Sequence[nnx.Module]) -> bool:
    """Whether a GPU's quantizer makes the codes of all from one read."""

    def on_gpu(layer: nnx.Module) -> bool:
        if not isinstance(layer, PackedDense) or layer.backend not in GPU_BACKENDS:
            return False
        return not (hasattr(layer, "smooth") or layer.has_step or layer.reads_tokens)

    return all(map(on_gpu, layers)) and len({layer.token_form for layer in layers}) == 1


def _clips(
    layers: Sequence[nnx.Module], x: jax.Array | jax.ShapeDtypeStruct, ctx: QuantContext
) -> tuple[list, dict]:
    """Each layer's clips of tokens like x, and the other arguments, which they share."""
    arguments = [layer.clip_arguments(x, ctx) for layer in layers]
    clips = [(each.pop("lower"), each.pop("upper")) for each in arguments]
    return clips, {"backend": layers[0].backend, **arguments[0]}


def _multiply(
    layers: Sequence[nnx.Module], tokens: Sequence[QuantizedTokens], ctx: QuantContext
) -> list[jax.Array]:
    return [layer(each, ctx) for layer, each in zip(layers, tokens, strict=True)]
