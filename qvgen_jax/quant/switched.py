"""Linears that are quantized or left alone by data: one program asks every layer at any bits.

No number of levels makes a quantizer the identity, and codes of more than 8 bits do not fit the
products. So 0 levels are a switch: such a layer multiplies what it is given, as `Dense` does.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from kernels.low_rank import rows_matmul
from kernels.quantize_tokens import dequantize_tokens, quantize_tokens
from kernels.reference import wide_type
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Dense, QuantContext, QuantDense
from qvgen_jax.quant.initialize import UNCLIPPED, quantize_params
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.weights import dequantize_weight, quantize_weight

LARGEST = 255.0  # Levels of 8 bits: what a quantizer that is off is given, unread.


class SwitchedDense(QuantDense):
    """The forward of a `QuantDense` without a branch, its two quantizers each on or off.

    `weight_levels` or `act_levels` of 0 are off. With both off the layer is a `Dense` in the
    compute type; otherwise it multiplies the operands' values in float32, as codes do exactly, so
    that what it changes is what quantization does, and not the compute type. Nothing is
    differentiated.
    """

    def __call__(self, x: jax.Array, ctx: QuantContext = QuantContext()) -> jax.Array:
        """`x [..., in]` to `[..., out]`."""
        x = self.prepare(x)
        kernel, weights, tokens = self.kernel[...], self.weight_levels[...], self.act_levels[...]

        def as_it_is(x: jax.Array) -> jax.Array:
            y = rows_matmul(x.astype(self.dtype), kernel.astype(self.dtype))
            return self._with_bias(y)

        def quantized(x: jax.Array) -> jax.Array:
            wide = wide_type(self.dtype)
            y = rows_matmul(self._tokens(x, tokens, ctx).astype(wide), self._kernel(weights, wide))
            return self._with_bias(y)

        with jax.default_matmul_precision("highest"):
            return jax.lax.cond((weights > 0) | (tokens > 0), quantized, as_it_is, x)

    def _with_bias(self, y: jax.Array) -> jax.Array:
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(self.dtype)

    def _tokens(self, x: jax.Array, levels: jax.Array, ctx: QuantContext) -> jax.Array:
        arguments = self.clip_arguments(x, ctx)
        arguments["levels"] = jnp.where(levels > 0, levels, LARGEST)
        values = dequantize_tokens(quantize_tokens(x, **arguments))
        return jnp.where(levels > 0, values, x.astype(values.dtype))

    def _kernel(self, levels: jax.Array, wide: jnp.dtype) -> jax.Array:
        kernel = self.kernel[...].astype(wide)
        zero_point = None if self.zero_point is None else self.zero_point[...]
        how = (self.scale[...], zero_point, jnp.where(levels > 0, levels, LARGEST))
        values = dequantize_weight(quantize_weight(kernel, *how), *how)
        return jnp.where(levels > 0, values, kernel)


def switched(config: QuantConfig) -> Callable[..., nnx.Module]:
    """A factory with `Dense`'s signature: `SwitchedDense`, but for what stays in full precision."""
    config = dataclasses.replace(config, rank=0, act_range="token")

    def dense(name: str, in_features: int, out_features: int, **arguments) -> nnx.Module:
        if name in config.full_precision:
            return Dense(name, in_features, out_features, **arguments)
        return SwitchedDense(name, in_features, out_features, config=config, **arguments)

    return dense


def switched_params(
    params: dict,
    names: Iterable[str],
    config: QuantConfig,
    activations: Mapping[str, jax.Array] | None = None,
) -> tuple[dict, dict]:
    """Params and levels of a switched network at the config's bits, everything on.

    As `quantize_params` at rank 0, weights with their searched ranges, but with ranges of the
    tokens' own in place of learned steps, and the learned clips open: 0.95 of a range would be most
    of the error at 8 bits. The release's constant clip (`clip_twice`) stays.
    """
    config = dataclasses.replace(config, rank=0, act_range="token")
    params, levels = quantize_params(params, names, config, activations)
    for name in config.quantized(names):
        node = layer_at(params, name)
        open_clips = {clip: jnp.full_like(node[clip], UNCLIPPED) for clip in ("lower", "upper")}
        params = with_layer(params, name, {**node, **open_clips})
    return params, levels


def switched_off(levels: dict, names: Iterable[str]) -> dict:
    """The levels of a network whose quantizers are all off."""
    for name in names:
        node = layer_at(levels, name)
        off = {key: jnp.zeros_like(node[key]) for key in ("weight_levels", "act_levels")}
        levels = with_layer(levels, name, {**node, **off})
    return levels


def switched_on(levels: dict, name: str, block: int | None, bits: tuple[int, int]) -> dict:
    """The levels with one layer on, in one block of its stack.

    Args:
        bits: of weights and activations; 0 leaves that quantizer as it is.
    """
    node, at = layer_at(levels, name), ... if block is None else block
    changed = {
        key: node[key].at[at].set(2.0**width - 1)
        for key, width in zip(("weight_levels", "act_levels"), bits, strict=True)
        if width
    }
    return with_layer(levels, name, {**node, **changed})
