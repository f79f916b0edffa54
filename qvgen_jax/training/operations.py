"""How many multiply-adds a training step takes, by network and pass, from its matrices' shapes.

Norms, softmax and the quantizers' element-wise work are left out.
"""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from kernels.attention_call import kept_name
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.models.linears import attended, linears
from qvgen_jax.quant.blocks import is_stacked

_NONE: Mapping[str, int] = MappingProxyType({})


class Product(NamedTuple):
    """Multiply-adds of one sample's forward, in one linear of all layers or one attention.

    Attributes:
        name: of the linear as `quantizable` lists it; `blocks.attention` of logits and weighted
            sum.
        kind: `linears`, `branch` (the low-rank one of a linear), `rotation` (of its tokens) or
            `attention`.
        count: of the multiply-adds.
        kept: whether policies of recomputing that keep attention keep its result.
    """

    name: str
    kind: str
    count: int
    kept: bool = False


def forward_products(
    model: TransformerConfig,
    tokens: int,
    text_tokens: int,
    rank: int = 0,
    quantized: Collection[str] = (),
    blocks: Mapping[str, int] = _NONE,
) -> list[Product]:
    """Of one sample's forward.

    Args:
        tokens: of the video.
        text_tokens: of the prompt.
        rank: columns of the branch in memory, 0 without one: a closed gate still costs its product.
            Applied to the tokens.
        quantized: names of the linears that have a branch.
        blocks: how many channels of its tokens a linear mixes before it quantizes them, for those
            that do.
    """
    found = []
    for linear in linears(model, tokens, text_tokens):
        rows = linear.rows * linear.count
        found.append(Product(linear.name, "linears", rows * linear.inner * linear.columns))
        if rank and linear.name in quantized:
            branch = rows * rank * (linear.inner + linear.columns)
            found.append(Product(linear.name, "branch", branch))
        if linear.name in blocks:
            rotation = rows * linear.inner * blocks[linear.name]
            found.append(Product(linear.name, "rotation", rotation))
    if "patch_embed.proj" not in quantizable(model):  # Where it is none of the linears.
        patch = model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
        count = tokens * patch * model.in_channels * model.dim
        found.append(Product("patch_embedding", "linears", count))
    for queries, keys in attended(model, tokens, text_tokens):
        count = model.num_layers * 2 * queries * keys * model.dim
        kept = kept_name(keys) is not None
        found.append(Product("blocks.attention", "attention", count, kept))
    return found


def step_work(
    model: TransformerConfig,
    tokens: int,
    text_tokens: int,
    rank: int,
    remat: str,
    quantized: Collection[str],
    *,
    blocks: Mapping[str, int] = _NONE,
    teacher: bool = True,
) -> dict[tuple[str, str], int]:
    """Multiply-adds of one sample in a training step, by (pass, kind).

    The passes are `teacher`, `forward`, `again` (what is recomputed) and `backward`, at twice the
    forward but for rotations, which have no weights. Arguments as of `forward_products`, and
    `remat`, see `qvgen_jax.models.remat`, and whether the `teacher` is asked.
    """
    work: dict[tuple[str, str], int] = {}

    def add(part: str, product: Product, times: int) -> None:
        key = (part, product.kind)
        work[key] = work.get(key, 0) + times * product.count

    for product in forward_products(model, tokens, text_tokens) if teacher else ():
        add("teacher", product, 1)
    for product in forward_products(model, tokens, text_tokens, rank, quantized, blocks):
        add("forward", product, 1)
        add("backward", product, 1 if product.kind == "rotation" else 2)
        if is_stacked(product.name) and _repeated(product, remat):
            add("again", product, 1)
    return work


def _repeated(product: Product, remat: str) -> bool:
    return remat != "none" and not (product.kept and remat in ("attention", "offload"))
