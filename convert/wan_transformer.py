"""Wan transformer: diffusers' tensor names beside ours."""

from convert.names import Entry
from qvgen_jax.models.wan import WanConfig

# (ours, diffusers') for the linears of one block.
_BLOCK_LINEARS = (
    *(
        (f"{attn}.{ours}", f"{attn}.{theirs}")
        for attn in ("attn1", "attn2")
        for ours, theirs in (
            ("to_q", "to_q"),
            ("to_k", "to_k"),
            ("to_v", "to_v"),
            ("to_out", "to_out.0"),
        )
    ),
    ("ffn.up", "ffn.net.0.proj"),
    ("ffn.down", "ffn.net.2"),
)

_EMBEDDER_LINEARS = (
    "condition_embedder.time_embedder.linear_1",
    "condition_embedder.time_embedder.linear_2",
    "condition_embedder.time_proj",
    "condition_embedder.text_embedder.linear_1",
    "condition_embedder.text_embedder.linear_2",
    "proj_out",
)


def _linear(ours: str, theirs: str, layers: int | None = None) -> list[Entry]:
    path = tuple(ours.split("."))
    return [
        Entry((*path, "kernel"), f"{theirs}.weight", "linear", layers),
        Entry((*path, "bias"), f"{theirs}.bias", "same", layers),
    ]


def name_table(config: WanConfig) -> list[Entry]:
    """Every tensor of a full-precision `transformer/` folder."""
    layers = config.num_layers
    window = (config.dim, config.in_channels, *config.patch_size)
    table = [
        Entry(("patch_embedding", "kernel"), "patch_embedding.weight", "patch", None, window),
        Entry(("patch_embedding", "bias"), "patch_embedding.bias"),
        Entry(("scale_shift_table",), "scale_shift_table"),
        Entry(("blocks", "scale_shift_table"), "blocks.{i}.scale_shift_table", "same", layers),
        Entry(("blocks", "norm2", "scale"), "blocks.{i}.norm2.weight", "same", layers),
        Entry(("blocks", "norm2", "bias"), "blocks.{i}.norm2.bias", "same", layers),
    ]
    for name in _EMBEDDER_LINEARS:
        table += _linear(name, name)
    for ours, theirs in _BLOCK_LINEARS:
        table += _linear(f"blocks.{ours}", f"blocks.{{i}}.{theirs}", layers)
    for attn in ("attn1", "attn2"):
        for norm in ("norm_q", "norm_k"):
            name = f"blocks.{{i}}.{attn}.{norm}.weight"
            table.append(Entry(("blocks", attn, norm, "scale"), name, "same", layers))
    return table
