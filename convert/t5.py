"""UMT5 encoder: transformers' tensor names beside ours."""

from collections.abc import Mapping

import numpy as np

from convert.names import Entry
from qvgen_jax.text.umt5 import UMT5Config

_EMBEDDING = "shared.weight"
_TIED = "encoder.embed_tokens.weight"

_LINEARS = (
    *((f"attention.{name}", f"layer.0.SelfAttention.{name}") for name in "qkvo"),
    ("ffn.gate", "layer.1.DenseReluDense.wi_0"),
    ("ffn.up", "layer.1.DenseReluDense.wi_1"),
    ("ffn.down", "layer.1.DenseReluDense.wo"),
)


def name_table(config: UMT5Config) -> list[Entry]:
    """Every tensor of a `text_encoder/` folder as `UMT5EncoderModel.save_pretrained` writes it."""
    layers, block = config.num_layers, "encoder.block.{i}"
    bias = f"{block}.layer.0.SelfAttention.relative_attention_bias.weight"
    table = [
        Entry(("token_embedding",), _EMBEDDING),
        Entry(("final_norm", "scale"), "encoder.final_layer_norm.weight"),
        Entry(("blocks", "attention", "relative_bias"), bias, "same", layers),
    ]
    for i, norm in enumerate(("norm_attention", "norm_ffn")):
        name = f"{block}.layer.{i}.layer_norm.weight"
        table.append(Entry(("blocks", norm, "scale"), name, "same", layers))
    for ours, theirs in _LINEARS:
        path = ("blocks", *ours.split("."), "kernel")
        table.append(Entry(path, f"{block}.{theirs}.weight", "linear", layers))
    return table


def untie(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The token embedding under one name: files hold it as either of its two names, or both."""
    tensors = dict(tensors)
    tied = tensors.pop(_TIED, None)
    if tied is not None:
        tensors.setdefault(_EMBEDDING, tied)
    return tensors
