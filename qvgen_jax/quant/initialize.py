"""From a full-precision transformer's parameters to those of the quantized one at step 0."""

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

from kernels.reference import at_least_float32
from qvgen_jax import sharding
from qvgen_jax.quant.blocks import levels_of
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.low_rank import initial_adapter, initial_branch
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.rotation import rotate, rotate_kernel
from qvgen_jax.quant.smoothing import smooth_factors
from qvgen_jax.quant.steps import initial_step
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
        if factors is not None or block > 1:
            kernel = _smoothed_and_rotated(node["kernel"], factors, name, block)
            params = with_layer(params, name, {**node, "kernel": kernel})
        if name in config.folded:
            source = config.folded[name][0]
            node = _fold(layer_at(params, source), factors, block)
            params = with_layer(params, source, node)
        elif factors is not None:
            smooth[name] = factors
    return params, smooth


@partial(jax.jit, static_argnames=("name", "block"))
def _smoothed_and_rotated(
    kernel: jax.Array, factors: jax.Array | None, name: str, block: int
) -> jax.Array:
    # One layer at a time, and each back where it lay. Over a mesh a block of channels is cut
    # apart: the compiler would have every device rotate the stack, and keep it.
    def one(layer: tuple[jax.Array, jax.Array | None]) -> jax.Array:
        kernel, factors = layer
        if factors is not None:
            kernel = at_least_float32(kernel) * factors[:, None]
        return sharding.cut(rotate_kernel(kernel, block), f"{name}.kernel")

    layers = kernel.reshape(-1, *kernel.shape[-2:])
    factors = None if factors is None else factors.reshape(-1, factors.shape[-1])
    return jax.lax.map(one, (layers, factors)).reshape(kernel.shape)


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


def _ranges(
    config: QuantConfig, name: str, act_levels: jax.Array, moments: Mapping[str, jax.Array] | None
) -> dict:
    """What a layer's activations are quantized with: clips, or steps; `[buckets]` for each layer.

    Every bucket starts from the same step (EfficientDM, train_efficientdm.py): a few batches hold
    no clip at most of the timesteps.
    """

    def everywhere(start: jax.Array) -> jax.Array:
        return jnp.broadcast_to(start, (*act_levels.shape, config.buckets_of(name)))

    if not config.learned_steps:
        clips = everywhere(initial_clips(1, config.initial_clip))
        return {"lower": clips, "upper": clips}
    if moments is None or name not in moments:
        raise ValueError(
            f"learned steps need the mean activation of {name!r}; "
            "qvgen_jax.training.calibrate.activation_moments measures it"
        )
    start = initial_step(moments[name], act_levels, config.act_range == "learned_zero")
    named = zip(("act_scale", "act_zero_point"), start, strict=True)
    return {leaf: everywhere(value[..., None]) for leaf, value in named if value is not None}


def quantize_params(
    params: dict,
    names: Iterable[str],
    config: QuantConfig,
    activations: Mapping[str, jax.Array] | None = None,
    moments: Mapping[str, jax.Array] | None = None,
    seed: int = 0,
) -> tuple[dict, dict]:
    """Adds scale, zero point, clips or steps, and the branch to every layer that is quantized.

    Args:
        params: nested dict; a quantizable layer holds `kernel [in, out]`, or `[layers, in, out]`
            where blocks are stacked.
        names: the model's quantizable layers, e.g. `blocks.attn1.to_q`.
        config: bits, rank, clips, rotation, smoothing and the layers that stay in full precision.
        activations: for smoothing, each layer's largest magnitude of every input channel, `[in]` or
            `[layers, in]`.
        moments: for learned steps, the means of |x|, x and x^2 of what each layer reads, `[3]` or
            `[layers, 3]`.
        seed: of merged adapters, which start at random.

    Returns:
        params (a new dict that shares the untouched arrays) and levels, the nested dict of the
        `Levels` variables: `weight_levels` and `act_levels`, float32 `[]` or `[layers]`, and
        `smooth [in]` or `[layers, in]` where a layer divides its tokens.

    Raises:
        UserError: a name that neither the parameters nor the model have.
        ValueError: smoothing or learned steps, and no activations of a layer.
    """
    params, smooth = _prepare(params, names, config, activations)
    levels: dict = {}
    for name in config.quantized(names):
        node = layer_at(params, name)
        kernel = node["kernel"]
        stack = kernel.shape[:-2]
        most = levels_of(config, name, range(stack[0]) if stack else None)
        weight_levels, act_levels = jnp.asarray(most)
        leaves = _quantize_stack(
            kernel.reshape(-1, *kernel.shape[-2:]),
            weight_levels.reshape(-1),
            0 if config.merged else config.rank,
            config.symmetric_weights,
        )
        leaves = {key: leaf.reshape(*stack, *leaf.shape[1:]) for key, leaf in leaves.items()}
        if config.merged:
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            leaves["L"], leaves["R"] = initial_adapter(key, kernel, config.rank)
        ranges = _ranges(config, name, act_levels, moments)
        params = with_layer(params, name, {**node, **leaves, **ranges})
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

    The floor of every comparison, of methods with learned steps too. Arguments and result as of
    `quantize_params`, at rank 0 and with every token's own range.
    """
    config = dataclasses.replace(config, rank=0, act_range="token")
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
