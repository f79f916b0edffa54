"""CogVideoX transformer: diffusers' tensor names beside ours."""

from convert.names import Entry
from qvgen_jax.models.cogvideox_config import CogVideoXConfig

# (ours, diffusers') for the linears and the norms of one block.
_BLOCK_LINEARS = (
    ("norm1.linear", "norm1.linear"),
    ("norm2.linear", "norm2.linear"),
    ("attn1.to_q", "attn1.to_q"),
    ("attn1.to_k", "attn1.to_k"),
    ("attn1.to_v", "attn1.to_v"),
    ("attn1.to_out", "attn1.to_out.0"),
    ("ffn.up", "ff.net.0.proj"),
    ("ffn.down", "ff.net.2"),
)
_BLOCK_NORMS = ("norm1.norm", "norm2.norm", "attn1.norm_q", "attn1.norm_k")

_LINEARS = (
    "patch_embed.text_proj",
    "time_embedding.linear_1",
    "time_embedding.linear_2",
    "norm_out.linear",
    "proj_out",
)
_NORMS = ("norm_final", "norm_out.norm")


def _pair(
    ours: str, theirs: str, leaf: str, layout: str = "same", layers: int | None = None
) -> list[Entry]:
    path = tuple(ours.split("."))
    return [
        Entry((*path, leaf), f"{theirs}.weight", layout, layers),
        Entry((*path, "bias"), f"{theirs}.bias", "same", layers),
    ]


def name_table(config: CogVideoXConfig) -> list[Entry]:
    """Every tensor of a full-precision `transformer/` folder."""
    layers, proj = config.num_layers, "patch_embed.proj"
    table = _pair(proj, proj, "kernel", "linear")
    if not config.unfolds_patches:
        window = (config.dim, config.in_channels, *config.patch_size[1:])
        table[0] = table[0]._replace(layout="unfold", shape=window)
    for name in _LINEARS:
        table += _pair(name, name, "kernel", "linear")
    for name in _NORMS:
        table += _pair(name, name, "scale")
    for ours, theirs in _BLOCK_LINEARS:
        theirs = f"transformer_blocks.{{i}}.{theirs}"
        table += _pair(f"blocks.{ours}", theirs, "kernel", "linear", layers)
    for name in _BLOCK_NORMS:
        table += _pair(
            f"blocks.{name}", f"transformer_blocks.{{i}}.{name}", "scale", "same", layers
        )
    return table
