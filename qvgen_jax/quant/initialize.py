"""From a full-precision transformer's parameters to those of the quantized one at step 0."""

import dataclasses
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from kernels.reference import at_least_float32
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.low_rank import initial_branch
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.rotation import rotate, rotate_kernel
from qvgen_jax.quant.smoothing import smooth_factors
from qvgen_jax.quant.tokens import initial_clips
from qvgen_jax.quant.weights import (
    dequantize_weight,
    min_max_range,
    quantize_weight,
    search_range,
)


def _prepare(
    params: dict,
    names: Iterable[str],
    config: QuantConfig,
    activations: Mapping[str, jax.Array] | None,
) -> tuple[dict, dict[str, jax.Array]]:
    """Every kernel as its smoothed and rotated tokens want it, and the factors by layer.

    Where that is folded, the columns and the bias of the linear before smooth and rotate.
    """
    teacher, smooth = params, {}
    for name in config.quantized(names):
        node = layer_at(params, name)
        width = node["kernel"].shape[-2]
        block, factors = config.block_of(name, width), None
        if config.smoothing:
            kernel = layer_at(teacher, name)["kernel"]
            factors = smooth_factors(_maxima(activations, name), kernel, config.smoothing)
            node = {**node, "kernel": at_least_float32(node["kernel"]) * factors[..., None]}
        if block > 1:
            node = {**node, "kernel": rotate_kernel(node["kernel"], block)}
        params = with_layer(params, name, node)
        if name in config.folded:
            source = config.folded[name][0]
            node = _fold(layer_at(params, source), factors, block)
            params = with_layer(params, source, node)
        elif factors is not None:
            smooth[name] = factors
    return params, smooth


def _fold(node: dict, factors: jax.Array | None, block: int) -> dict:
    """A linear whose outputs are smoothed and rotated."""
    outputs = {leaf: at_least_float32(node[leaf]) for leaf in ("kernel", "bias") if leaf in node}
    if factors is not None:
        divided = {"kernel": factors[..., None, :], "bias": factors}
        outputs = {leaf: array / divided[leaf] for leaf, array in outputs.items()}
    return {**node, **{leaf: rotate(array, block) for leaf, array in outputs.items()}}


def _maxima(activations: Mapping[str, jax.Array] | None, name: str) -> jax.Array:
    if activations is None or name not in activations:
        raise ValueError(
            f"smoothing needs the largest activations of {name!r}; "
            "qvgen_jax.training.calibrate.activation_maxima measures them"
        )
    return activations[name]


def _quantize_kernel(kernel: jax.Array, levels: jax.Array, rank: int, symmetric: bool) -> dict:
    scale, zero_point = search_range(kernel, levels, symmetric)
    leaves = {"scale": scale} if symmetric else {"scale": scale, "zero_point": zero_point}
    if rank:
        codes = quantize_weight(kernel, scale, zero_point, levels)
        dequantized = dequantize_weight(codes, scale, zero_point, levels)
        leaves["L"], leaves["R"] = initial_branch(kernel, dequantized, rank)
    return leaves


@partial(jax.jit, static_argnames=("rank", "symmetric"))
def _quantize_stack(kernels: jax.Array, levels: jax.Array, rank: int, symmetric: bool) -> dict:
    # One layer at a time: the memory of one kernel beyond the parameters themselves.
    return jax.lax.map(lambda pair: _quantize_kernel(*pair, rank, symmetric), (kernels, levels))


def quantize_params(
    params: dict,
    names: Iterable[str],
    config: QuantConfig,
    activations: Mapping[str, jax.Array] | None = None,
) -> tuple[dict, dict]:
    """Adds scale, zero point, clips and the branch to every layer that the config quantizes.

    Args:
        params: nested dict; a quantizable layer holds `kernel [in, out]`, or `[layers, in, out]`
            where blocks are stacked.
        names: the model's quantizable layers, e.g. `blocks.attn1.to_q`.
        config: bits, rank, clips, rotation, smoothing and the layers that stay in full precision.
        activations: for smoothing, each layer's largest magnitude of every input channel, `[in]` or
            `[layers, in]`.

    Returns:
        params (a new dict that shares the untouched arrays) and levels, the nested dict of the
        `Levels` variables: `weight_levels` and `act_levels`, float32 `[]` or `[layers]`, and
        `smooth [in]` or `[layers, in]` where a layer divides its tokens.

    Raises:
        UserError: a name that neither the parameters nor the model have.
        ValueError: smoothing, and no activations of a layer.
    """
    params, smooth = _prepare(params, names, config, activations)
    levels: dict = {}
    for name in config.quantized(names):
        node = layer_at(params, name)
        kernel = node["kernel"]
        stack = kernel.shape[:-2]
        weight_levels, act_levels = (
            jnp.full(stack, 2**bits - 1, jnp.float32) for bits in config.bits_of(name)
        )
        leaves = _quantize_stack(
            kernel.reshape(-1, *kernel.shape[-2:]),
            weight_levels.reshape(-1),
            config.rank,
            config.symmetric_weights,
        )
        leaves = {key: leaf.reshape(*stack, *leaf.shape[1:]) for key, leaf in leaves.items()}
        clips = initial_clips(config.buckets_of(name), config.initial_clip)
        clips = jnp.broadcast_to(clips, (*stack, *clips.shape))
        params = with_layer(params, name, {**node, **leaves, "lower": clips, "upper": clips})
        fixed = {"weight_levels": weight_levels, "act_levels": act_levels}
        fixed |= {"smooth": smooth[name]} if name in smooth else {}
        levels = with_layer(levels, name, fixed)
    return params, levels


@jax.jit
def _relative_errors(node: dict, weight_levels: jax.Array) -> jax.Array:
    def one(pair):
        kernel, *weight = pair
        error = dequantize_weight(quantize_weight(kernel, *weight), *weight) - kernel
        return jnp.linalg.norm(error) / jnp.linalg.norm(kernel)

    zero_point = node.get("zero_point")
    return jax.lax.map(one, (node["kernel"], node["scale"], zero_point, weight_levels))


def quantization_errors(params: dict, levels: dict, names: Iterable[str]) -> dict[str, jax.Array]:
    """Relative error `|quantized - kernel| / |kernel|` of every named layer, without the branch.

    Returns:
        name to float32 `[layers]` (`[1]` for a layer that is not stacked).
    """
    errors = {}
    for name in names:
        node, kernel = layer_at(params, name), layer_at(params, name)["kernel"]
        stacked = {
            key: node[key].reshape(-1, *node[key].shape[kernel.ndim - 2 :])
            for key in ("kernel", "scale", "zero_point")
            if key in node
        }
        weight_levels = layer_at(levels, name)["weight_levels"].reshape(-1)
        errors[name] = _relative_errors(stacked, weight_levels)
    return errors


UNCLIPPED = 20.0
"""The sigmoid of this is 1 in float32: a token keeps its whole range."""


def round_to_nearest(
    params: dict,
    names: Iterable[str],
    config: QuantConfig,
    activations: Mapping[str, jax.Array] | None = None,
) -> tuple[dict, dict]:
    """What low bits cost when nothing is learned: min-max ranges that contain 0, no branch.

    The floor of every comparison. Arguments and result as of `quantize_params`, at rank 0.
    """
    config = dataclasses.replace(config, rank=0)
    params, levels = quantize_params(params, names, config, activations)
    for name in config.quantized(names):
        node = layer_at(params, name)
        most = layer_at(levels, name)["weight_levels"]
        scale, zero_point = min_max_range(node["kernel"], most, config.symmetric_weights)
        leaves = {"scale": scale}
        leaves |= {} if zero_point is None else {"zero_point": zero_point}
        leaves |= {clip: jnp.full_like(node[clip], UNCLIPPED) for clip in ("lower", "upper")}
        params = with_layer(params, name, {**node, **leaves})
    return params, levels
