"""The quantizable linears of a transformer as products: how many, and of what sizes."""

import math
from typing import NamedTuple

from kernels.operands import Product
from qvgen_jax.models import (
    TransformerConfig,
    abstract_params,
    quantizable,
    text_only,
    time_only,
)
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.quant.blocks import is_stacked
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import layer_at


class Linear(NamedTuple):
    """One linear, or the same one in every block.

    Attributes:
        name: as `quantizable` lists it.
        count: of layers that have it.
        rows: that one video puts through it.
        inner, columns: channels in and out.
    """

    name: str
    count: int
    rows: int
    inner: int
    columns: int


def video_tokens(
    config: TransformerConfig,
    num_frames: int,
    height: int,
    width: int,
    factors: tuple[int, int] = (4, 8),
) -> int:
    """Tokens of one video.

    Args:
        num_frames, height, width: of its pixels.
        factors: by which the VAE shrinks time and space; those of the published ones.
    """
    temporal, spatial = factors
    frames = 1 + (num_frames - 1) // temporal
    sizes = (
        -(-frames // config.patch_size[0]) * config.patch_size[0],
        *(side // spatial for side in (height, width)),
    )
    return math.prod(size // patch for size, patch in zip(sizes, config.patch_size, strict=True))


def linears(config: TransformerConfig, tokens: int, text_tokens: int) -> list[Linear]:
    """All quantizable linears, in the model's order.

    Args:
        tokens: of the video, see `video_tokens`.
        text_tokens: of the prompt.
    """
    params = abstract_params(config)
    found = []
    for name in quantizable(config):
        *layers, inner, columns = layer_at(params, name)["kernel"].shape
        rows = tokens
        if name in time_only(config):
            rows = 1
        elif name in text_only(config):
            rows = text_tokens
        elif isinstance(config, CogVideoXConfig) and is_stacked(name):
            rows = tokens + text_tokens  # Its blocks see both as one sequence.
        found.append(Linear(name, math.prod(layers), rows, inner, columns))
    return found


def quantized_products(
    config: TransformerConfig, tokens: int, text_tokens: int, quant: QuantConfig
) -> list[tuple[str, int, Product]]:
    """Name, number of layers and product of every quantized linear; by bits, where blocks differ.

    Args: as `linears`, and what of them is quantized.
    """
    found = []
    for x in linears(config, tokens, text_tokens):
        if x.name in quant.full_precision:
            continue
        held = quant.blocks_by_bits(x.name, x.count if is_stacked(x.name) else None)
        for bits, blocks in held.items():
            found.append((x.name, len(blocks), Product(x.rows, x.inner, x.columns, *bits)))
    return found


def attended(config: TransformerConfig, tokens: int, text_tokens: int) -> list[tuple[int, int]]:
    """Queries and keys of every attention of a block, for one video."""
    if isinstance(config, CogVideoXConfig):
        return [(tokens + text_tokens,) * 2]
    return [(tokens, tokens), (tokens, text_tokens)]
