"""What a student's quantized layers are like as they stand."""

from collections.abc import Iterable, Mapping

import jax
import numpy as np

from qvgen_jax.quant.initialize import quantization_errors
from qvgen_jax.quant.low_rank import singular_values
from qvgen_jax.quant.named import layer_at

_LEADING = 8  # Singular values that are told of each branch.


def measure_layers(
    params: Mapping, levels: Mapping, names: Iterable[str], gate: jax.Array | None = None
) -> dict[str, list[dict]]:
    """Every layer's weights, branch and clips.

    Args:
        params, levels: the student's.
        names: its quantized layers; `blocks.` ones stand for all layers of their stack.
        gate: float32 `[rank]`, each component's weight in the branch; None once that is gone.

    Returns:
        By name a list of one dict per layer of the stack, of one for a layer that is not stacked:
        `weight_error`, `|W - dequantized| / |W|`, without the branch; `branch_norm`, the Frobenius
        norm of the gated branch, and its leading `singular_values`, as far as components live, both
        None without a branch; `clip_low` and `clip_high`, the learned multipliers of the tokens'
        minimum and maximum, means over the timesteps' buckets, where a layer has clips.
    """
    names = tuple(names)
    errors = quantization_errors(params, levels, names)
    return {name: _rows(layer_at(params, name), errors[name], gate) for name in names}


def _rows(node: Mapping, errors: jax.Array, gate: jax.Array | None) -> list[dict]:
    named = (("clip_low", "lower"), ("clip_high", "upper"))
    clips = {name: _mean_clips(node[leaf]) for name, leaf in named if leaf in node}
    branches = _branches(node, gate, len(errors))
    return [
        {"weight_error": float(error), **branches[layer]}
        | {name: values[layer] for name, values in clips.items()}
        for layer, error in enumerate(np.asarray(errors))
    ]


_singular_values = jax.jit(singular_values)


def _branches(node: Mapping, gate: jax.Array | None, layers: int) -> list[dict]:
    if gate is None or "L" not in node:
        return [{"branch_norm": None, "singular_values": None}] * layers
    values = np.asarray(_singular_values(node["L"], node["R"], gate))
    alive = min(_LEADING, int((np.asarray(gate) > 0).sum()))
    return [
        {"branch_norm": float(np.linalg.norm(row)), "singular_values": row[:alive].tolist()}
        for row in values.reshape(layers, -1)
    ]


def _mean_clips(raw: jax.Array) -> list[float]:
    """One per layer of `[buckets]` or `[layers, buckets]`."""
    return np.atleast_1d(np.asarray(jax.nn.sigmoid(raw).mean(-1))).tolist()
