"""T5 and UMT5 encoders: transformers' tensor names beside ours, and int8 weights while reading."""

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax import nnx

from convert.names import Entry, check_names, torch_names
from qvgen_jax.errors import UserError
from qvgen_jax.text.int8 import quantize_rows
from qvgen_jax.text.t5 import T5Config, T5Encoder

_EMBEDDING = "shared.weight"
_TIED = "encoder.embed_tokens.weight"

_LINEARS = (
    *((f"attention.{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
    ("ffn.gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn.up", "layer.1.DenseReluDense.wi_1"),
    ("ffn.down", "layer.1.DenseReluDense.wo"),
)


def name_table(config: T5Config) -> list[Entry]:
    """Every tensor of a `text_encoder/` folder as transformers' encoder classes save it."""
    layers, block = config.num_layers, "encoder.block.{i}"
    bias = "layer.0.SelfAttention.relative_attention_bias.weight"
    table = [
        Entry(("token_embedding",), _EMBEDDING),
        Entry(("final_norm", "scale"), "encoder.final_layer_norm.weight"),
    ]
    if config.shares_bias:
        table.append(Entry(("relative_bias",), f"encoder.block.0.{bias}"))
    else:
        path = ("blocks", "attention", "relative_bias")
        table.append(Entry(path, f"{block}.{bias}", "same", layers))
    for i, norm in enumerate(("norm_attention", "norm_ffn")):
        name = f"{block}.layer.{i}.layer_norm.weight"
        table.append(Entry(("blocks", norm, "scale"), name, "same", layers))
    for ours, theirs in _LINEARS:
        path = ("blocks", *ours.split("."), "kernel")
        table.append(Entry(path, f"{block}.{theirs}.weight", "linear", layers))
    return table


class Untied(Mapping[str, np.ndarray]):
    """The tensors with the token embedding under one name, each read when it is asked for.

    Files hold the embedding as either of its two names, or as both.
    """

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self._names = {name: name for name in tensors if name != _TIED}
        if _TIED in tensors:
            self._names.setdefault(_EMBEDDING, _TIED)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_int8(config: T5Config, tensors: Mapping[str, np.ndarray]) -> dict:
    """Parameters of an encoder with int8 weights, quantized tensor by tensor.

    At any time one source tensor and a few of its rows in float32 are in memory beside the result.

    Args:
        tensors: by PyTorch name, in any float type; untied.

    Raises:
        UserError: tensors are missing, unexpected or misshapen, or hold NaN.
    """

    def build() -> T5Encoder:
        return T5Encoder(config, key=jax.random.key(0), weights="int8")

    table, params = name_table(config), {}
    check_names(torch_names(table), tensors)
    expected = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
    for entry in table:
        *above, last = entry.path
        node, shapes = params, expected
        for part in above:
            node, shapes = node.setdefault(part, {}), shapes[part]
        if last == "kernel":
            layers, inner, out = shapes["codes"].shape
            node["codes"] = np.empty((layers, inner, out), np.int8)
            node["scale"] = np.empty((layers, out), np.float32)
            for i in range(layers):
                weight, name = _read(tensors, entry, (out, inner), i)
                codes, node["scale"][i] = quantize_rows(weight, name)
                node["codes"][i] = codes.T
        elif last == "token_embedding":
            codes, scale = quantize_rows(*_read(tensors, entry, shapes[last]["codes"].shape))
            node[last] = {"codes": codes, "scale": scale}
        elif entry.layers is None:
            node[last] = _read(tensors, entry, shapes[last].shape)[0].astype(np.float32)
        else:
            layers, *shape = shapes[last].shape
            rows = [_read(tensors, entry, tuple(shape), i)[0] for i in range(layers)]
            node[last] = np.stack(rows).astype(np.float32)
    return params


def _read(
    tensors: Mapping[str, np.ndarray], entry: Entry, shape: tuple[int, ...], layer: int = 0
) -> tuple[np.ndarray, str]:
    """One layer's tensor in PyTorch's layout, checked, and its name."""
    name = entry.name.format(i=layer)
    tensor = tensors[name]
    if tensor.shape != shape:
        raise UserError(
            f"{name} is {list(tensor.shape)}, expected {list(shape)} by config.json; they belong "
            "to different models"
        )
    return tensor, name
