"""Bits of single blocks: names, levels in training, and segments in a packed network."""

from itertools import combinations, pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.packed import packed_definition
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json, quantizable
from qvgen_jax.models.linears import quantized_products
from qvgen_jax.quant.blocks import bits_label, in_block, places_of, segments_of, split_block
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.packed_dense import PackedDense
from qvgen_jax.training.student import describe_layers
from tests.golden import tiny_models

WAN = config_from_json({"_class_name": "WanTransformer3DModel", **tiny_models.WAN_ODD})
HUGE = "blocks." + "9" * 5000 + ".ffn.up"
UP, DOWN = "blocks.ffn.up", "blocks.ffn.down"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("blocks.7.ffn.up", (7, UP)),
        ("blocks.12.attn1.to_q", (12, "blocks.attn1.to_q")),
        (UP, (None, UP)),
        ("proj_out", (None, "proj_out")),
        ("blocks.07.ffn.up", (None, "blocks.07.ffn.up")),  # No second name for block 7.
        pytest.param(HUGE, (None, HUGE), id="huge"),  # A number that Python refuses.
    ],
)
def test_a_name_says_which_block_it_is_of(name, expected):
    assert split_block(name) == expected
    assert in_block(expected[1], expected[0]) == name


def test_the_name_of_one_block_goes_before_that_of_all():
    config = QuantConfig(4, 4, bits={UP: (3, 3), "blocks.1.ffn.up": (8, 6)})
    assert [config.bits_of(UP, block) for block in range(3)] == [(3, 3), (8, 6), (3, 3)]
    assert config.bits_of(DOWN, 1) == (4, 4)
    assert config.blocks_by_bits(UP, 3) == {(3, 3): [0, 2], (8, 6): [1]}


def test_every_block_trains_with_its_own_levels():
    kernels = jnp.asarray(np.random.default_rng(0).normal(size=(3, 8, 6)), jnp.float32)
    config = QuantConfig(4, 4, rank=0, bits={"blocks.1.ffn.up": (8, 3)})
    params, levels = quantize_params({"blocks": {"ffn": {"up": {"kernel": kernels}}}}, [UP], config)
    found = layer_at(levels, UP)
    np.testing.assert_array_equal(found["weight_levels"], [15, 255, 15])
    np.testing.assert_array_equal(found["act_levels"], [15, 7, 15])
    alone, _ = quantize_params(
        {"layer": {"kernel": kernels[1]}}, ["layer"], QuantConfig(8, 3, rank=0)
    )
    np.testing.assert_array_equal(layer_at(params, UP)["scale"][1], alone["layer"]["scale"])


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        ({"blocks.2.ffn.up": (8, 8)}, r"bits to 'blocks.2.ffn.up', and the model has 2 blocks, 0"),
        ({"blocks.0.ffn.upp": (8, 8)}, r"names 'blocks.ffn.upp', .*nearest is 'blocks.ffn.up'"),
        ({"blocks.01.ffn.up": (8, 8)}, r"names 'blocks.01.ffn.up', which is no quantizable layer"),
        ({"blocks.0.ffn.up": (9, 8)}, r"bits=\(9, 8\) of blocks.0.ffn.up; expected"),
    ],
)
def test_a_block_or_layer_that_is_not_there_is_refused(bits, message):
    with pytest.raises(UserError, match=message):
        packed_definition(WAN, QuantConfig(rank=0, bits=bits), jnp.float32)


def test_full_precision_in_one_block_is_refused_with_the_way_out():
    config = QuantConfig(full_precision=("blocks.1.ffn.up",))
    with pytest.raises(UserError, match=r"in all blocks or in none; give that block 8 bits .*8, 8"):
        config.quantized(quantizable(WAN))


def test_the_list_of_layers_says_which_blocks_have_which_bits():
    quant = QuantConfig(bits={"blocks.1.ffn.up": (8, 8)})
    line = next(x for x in describe_layers(WAN, quant).splitlines() if UP in x)
    assert "W4A4 (blocks 0), W8A8 (blocks 1)" in line


def test_products_are_counted_by_bits_where_blocks_differ():
    quant = QuantConfig(bits={"blocks.1.ffn.up": (8, 8)})
    rows = quantized_products(WAN, 100, 5, quant)
    found = [
        (count, product.weight_bits, product.act_bits)
        for name, count, product in rows
        if name == UP
    ]
    assert found == [(1, 4, 4), (1, 8, 8)]
    assert sum(count for _, count, _ in rows) == 6 + 10 * WAN.num_layers


def bounds(config, layers, **how):
    return [(x.start, x.stop) for x in segments_of(config, [UP, DOWN, "proj_out"], layers, **how)]


def test_blocks_that_differ_within_a_container_are_one_segment():
    same = QuantConfig(4, 4, bits={"blocks.1.ffn.up": (3, 3), "blocks.2.ffn.down": (2, 4)})
    assert bounds(same, 6) == [(0, 6)]
    wider = QuantConfig(4, 4, bits={"blocks.1.ffn.up": (8, 8), "blocks.2.ffn.up": (5, 8)})
    assert bounds(wider, 6) == [(0, 1), (1, 3), (3, 6)]
    middle = segments_of(wider, [UP, DOWN], 6)[1].config
    assert (middle.bits_of(UP), middle.bits_of(DOWN)) == ((8, 8), (4, 4))


def test_too_many_segments_are_joined_where_it_costs_least():
    # Blocks 0, 2, 4 of 7 have 8 bits; joining 2 to 4 widens one layer, anything else more.
    wide = {f"blocks.{block}.ffn.up": (8, 4) for block in (0, 2, 4)}
    wide["blocks.1.ffn.down"] = (8, 4)
    assert bounds(QuantConfig(4, 4, bits=wide), 7, most=4) == [(0, 1), (1, 2), (2, 5), (5, 7)]
    assert bounds(QuantConfig(4, 4, bits=wide), 7, most=1) == [(0, 7)]


@pytest.mark.parametrize("seed", range(3))
def test_no_other_segments_widen_fewer_layers(seed):
    wide = np.random.default_rng(seed).random((9, 2)) < 0.5
    named = [(block, name) for block, row in enumerate(wide) for name in np.array([UP, DOWN])[row]]
    config = QuantConfig(4, 4, bits={in_block(name, block): (8, 4) for block, name in named})

    def widened(cuts):
        parts = [wide[start:stop] for start, stop in pairwise((0, *cuts, 9))]
        return sum((part.any(0) & ~part).sum() for part in parts)

    found = bounds(config, 9, most=3)
    best = min(widened(cuts) for cuts in combinations(range(1, 9), 2))
    assert best > 0
    assert widened([start for start, _ in found[1:]]) == best


def test_a_name_for_tables_says_that_some_layers_have_other_bits():
    assert bits_label(4, 3, ()) == "W4A3"
    assert bits_label(4, 3, {UP: (8, 8)}) == "W4A3 and others"


def test_one_segment_has_the_parameters_of_a_network_without_bits_of_blocks():
    mixed = QuantConfig(4, 4, rank=0, bits={"blocks.1.ffn.up": (3, 3)})
    found, plain = (
        packed_definition(WAN, quant, jnp.float32) for quant in (mixed, QuantConfig(rank=0))
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), found.shapes) == jax.tree.map(
        lambda x: (x.shape, x.dtype), plain.shapes
    )
    assert places_of(UP, found.segments)[0].path == UP
    np.testing.assert_array_equal(layer_at(found.levels, UP)["weight_levels"], [15, 7])


def test_layers_share_quantized_tokens_only_where_every_block_has_the_same_bits():
    q, k, v, out = (f"blocks.attn1.to_{name}" for name in ("q", "k", "v", "out"))
    bits = {"blocks.1.attn1.to_q": (4, 3), k: (3, 4), "blocks.1.attn1.to_v": (3, 4)}
    quant = QuantConfig(4, 4, rank=0, bits=bits)
    (segment,) = segments_of(quant, [q, k, v, out], 2)
    forms = {
        name: PackedDense(name, 8, 8, config=segment.config, key=jax.random.key(0)).token_form
        for name in (q, k, v)
    }
    assert segment.config.bits_of(q)[1] == 4  # As wide as the others' in memory.
    assert segment.config.token_bits(q) == (4, 3)
    # Not so where weights alone differ, nor where two named blocks are not all.
    assert segment.config.token_bits(v) == (4,)
    first = QuantConfig(4, 4, bits={"blocks.0.attn1.to_q": (4, 8), "blocks.1.attn1.to_q": (4, 8)})
    assert first.token_bits(q) == (8, 8)
    assert forms[k] == forms[v] != forms[q]
