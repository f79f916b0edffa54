"""The names of a released checkpoint at real size, planned from headers alone."""

import math
from pathlib import Path

import pytest

from convert.released_names import is_released, plan_released, recipe_of
from convert.safetensors_file import TensorInfo
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig

DIM, FFN, TEXT, FREQ, BLOCKS, BUCKETS, RANK = 1536, 8960, 4096, 256, 30, 50, 32
WAN_1_3B = WanConfig(num_attention_heads=12, ffn_dim=FFN, num_layers=BLOCKS)


def wan_linears() -> dict[str, tuple[int, int]]:
    """Every linear of Wan-1.3B by diffusers' name: `[out, in]`."""
    root = "condition_embedder"
    linears = {
        f"{root}.time_embedder.linear_1": (DIM, FREQ),
        f"{root}.time_embedder.linear_2": (DIM, DIM),
        f"{root}.time_proj": (6 * DIM, DIM),
        f"{root}.text_embedder.linear_1": (DIM, TEXT),
        f"{root}.text_embedder.linear_2": (DIM, DIM),
        "proj_out": (64, DIM),
    }
    for i in range(BLOCKS):
        for attention in ("attn1", "attn2"):
            for name in ("to_q", "to_k", "to_v", "to_out.0"):
                linears[f"blocks.{i}.{attention}.{name}"] = (DIM, DIM)
        linears[f"blocks.{i}.ffn.net.0.proj"] = (FFN, DIM)
        linears[f"blocks.{i}.ffn.net.2"] = (DIM, FFN)
    return linears


def wan_others() -> dict[str, tuple[int, ...]]:
    """Everything else of Wan-1.3B."""
    others = {
        "patch_embedding.weight": (DIM, 16, 1, 2, 2),
        "patch_embedding.bias": (DIM,),
        "scale_shift_table": (1, 2, DIM),
    }
    for i in range(BLOCKS):
        others[f"blocks.{i}.scale_shift_table"] = (1, 6, DIM)
        for leaf in ("weight", "bias"):
            others[f"blocks.{i}.norm2.{leaf}"] = (DIM,)
        for attention in ("attn1", "attn2"):
            for norm in ("norm_q", "norm_k"):
                others[f"blocks.{i}.{attention}.{norm}.weight"] = (DIM,)
    return others


def released_shapes(rank: int = 0, full_precision: tuple[str, ...] = ()) -> dict[str, tuple]:
    """The released checkpoint's names, written out as their linear registers them."""
    shapes = wan_others()
    for stem, (fan_out, fan_in) in wan_linears().items():
        if stem in full_precision:
            shapes |= {f"{stem}.weight": (fan_out, fan_in), f"{stem}.bias": (fan_out,)}
            continue
        shapes[f"{stem}.w"] = (fan_out, fan_in)
        shapes[f"{stem}.b"] = (fan_out,)
        shapes[f"{stem}.wquantizer.scale"] = (fan_out, 1)
        shapes[f"{stem}.wquantizer.zero_point"] = (fan_out, 1)
        shapes[f"{stem}.aquantizer.upper"] = (BUCKETS,)
        shapes[f"{stem}.aquantizer.lower"] = (BUCKETS,)
        if rank:
            shapes[f"{stem}.wquantizer.L"] = (fan_out, rank)
            shapes[f"{stem}.wquantizer.R"] = (rank, fan_in)
    return shapes


def headers(shapes: dict[str, tuple]) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(Path("x.safetensors"), name, "BF16", shape, 0, 2 * math.prod(shape))
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("rank", [0, RANK])
def test_every_tensor_of_the_released_wan_1_3b_is_accounted_for(rank):
    shapes = released_shapes(rank)
    plan = plan_released(WAN_1_3B, headers(shapes))
    linears = [linear for group in plan.quantized.values() for linear in group]
    assert len(linears) == 306
    leaves = ("w", "b", "wquantizer.scale", "wquantizer.zero_point")
    leaves += ("aquantizer.upper", "aquantizer.lower")
    leaves += ("wquantizer.L", "wquantizer.R") if rank else ()
    used = {f"{linear.stem}.{leaf}" for linear in linears for leaf in leaves}
    assert used | set(plan.others) == set(shapes)
    assert (
        sum(linear.fan_out * linear.fan_in + linear.fan_out for linear in linears)
        + sum(math.prod(shapes[name]) for name in plan.others)
        == 1_418_996_800
    )
    assert (plan.rank, plan.buckets, plan.adapter_rank, plan.kept) == (rank, BUCKETS, 0, {})
    assert recipe_of(WAN_1_3B).phase_steps == 444


def test_a_linear_without_a_scale_is_full_precision_in_every_block():
    kept = tuple(f"blocks.{i}.attn2.to_k" for i in range(BLOCKS))
    plan = plan_released(WAN_1_3B, headers(released_shapes(full_precision=kept)))
    assert plan.full_precision == ("blocks.attn2.to_k",)
    assert len(plan.kept) == 2 * BLOCKS


def test_every_culprit_is_named_at_once():
    shapes = released_shapes(full_precision=("blocks.7.attn1.to_v",))
    del shapes["blocks.3.norm2.bias"], shapes["proj_out.aquantizer.lower"]
    shapes["blocks.0.ffn.net.2.w"] = (DIM, DIM)
    shapes["extra.weight"] = (1,)
    with pytest.raises(UserError) as error:
        plan_released(WAN_1_3B, headers(shapes))
    for part in (
        "2 tensors missing [blocks.3.norm2.bias, proj_out.aquantizer.lower]",
        "1 unexpected [extra.weight]",
        "blocks.0.ffn.net.2.w is [1536, 1536], expected [1536, 8960]",
        "[blocks.7.attn1.to_v.w] not quantized",
    ):
        assert part in str(error.value)


def test_released_names_are_recognised():
    assert is_released(released_shapes())
    assert not is_released(wan_others() | {"proj_out.weight": (64, DIM), "proj_out.codes": (64,)})
