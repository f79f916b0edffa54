"""Linears applied where their tokens are made, so that a GPU quantizes them in the same kernel.

Everywhere else each linear quantizes for itself: XLA fuses that into what makes the tokens, and a
TPU does it in the product's prologue.
"""

from collections.abc import Sequence

import jax
from flax import nnx

from kernels.fused_quantize import GPU_BACKENDS, gelu, quantize_gelu, quantize_several
from qvgen_jax.quant.dense import PackedDense, QuantContext
from qvgen_jax.quant.rotation import rotate


def apply_each(layers: Sequence[nnx.Module], x: jax.Array, ctx: QuantContext) -> list[jax.Array]:
    """Several linears of the same tokens `x [batch, ..., in]`: q, k and v."""
    if not all(_quantizes_on_gpu(layer) for layer in layers):
        return [layer(x, ctx) for layer in layers]
    if len({layer.token_form for layer in layers}) > 1:
        return [layer(x, ctx) for layer in layers]
    x = rotate(x, layers[0].block)
    arguments = [layer.clip_arguments(x, ctx) for layer in layers]
    clips = [(each.pop("lower"), each.pop("upper")) for each in arguments]
    tokens = quantize_several(x, clips, backend=layers[0].backend, **arguments[0])
    return [layer(each, ctx) for layer, each in zip(layers, tokens, strict=True)]


def apply_to_gelu(layer: nnx.Module, x: jax.Array, ctx: QuantContext) -> jax.Array:
    """`layer(gelu(x))` of `x [batch, ..., in]`, the tanh approximation."""
    if not _quantizes_on_gpu(layer) or layer.block > 1:
        return layer(gelu(x), ctx)
    arguments = layer.clip_arguments(x, ctx)
    return layer(quantize_gelu(x, backend=layer.backend, **arguments), ctx)


def _quantizes_on_gpu(layer: nnx.Module) -> bool:
    packed = isinstance(layer, PackedDense)
    return packed and layer.backend in GPU_BACKENDS and not hasattr(layer, "smooth")
