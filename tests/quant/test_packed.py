"""The packed format: bits, layers and the config that describes them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.quant.code_planes import pack_codes, packed_bytes, unpack_codes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.packed import (
    pack_layer,
    quantization_config,
    read_quantization_config,
    unpack_layer,
)
from qvgen_jax.quant.weights import quantize_weight


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("in_features", [1, 7, 8, 33])
def test_packing_is_undone_by_unpacking(bits, in_features):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (5, in_features), dtype=np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (5, packed_bytes(in_features, bits))
    np.testing.assert_array_equal(unpack_codes(packed, bits, in_features), codes)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_take_exactly_their_bits(bits):
    assert packed_bytes(1536, bits) == 1536 * bits // 8


def test_the_even_input_is_in_the_low_nibble():
    np.testing.assert_array_equal(pack_codes(np.array([[1, 2, 15]]), 4), [[0x21, 0x0F]])


def test_three_bits_are_a_plane_of_two_and_a_plane_of_one():
    codes = np.array([[0b101, 0b010, 0b111, 0b000, 0b100]])
    expected = [[0b00_11_10_01, 0b00_00_00_00, 0b00010101]]
    np.testing.assert_array_equal(pack_codes(codes, 3), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_layer_survives_packing(bits):
    config = QuantConfig(weight_bits=bits, act_bits=bits, rank=0, buckets=7)
    kernel = jax.random.normal(jax.random.key(bits), (13, 6))
    params, levels = quantize_params({"a": {"kernel": kernel, "bias": kernel[0]}}, ["a"], config)
    layer = params["a"]
    tensors = pack_layer(layer, bits)
    assert tensors["codes"].shape == (6, packed_bytes(13, bits))
    assert tensors["clips"].shape == (7, 2)
    back = unpack_layer(tensors, bits, 13)
    codes = quantize_weight(
        layer["kernel"], layer["scale"], layer["zero_point"], levels["a"]["weight_levels"]
    )
    np.testing.assert_array_equal(back["codes"].astype(np.int8), codes)
    assert jnp.asarray(back["codes"]).dtype == (jnp.int4 if bits <= 4 else jnp.int8)
    np.testing.assert_array_equal(back["code_sum"], np.asarray(codes, np.int32).sum(0))
    for key in ("scale", "zero_point", "bias", "lower", "upper"):
        np.testing.assert_array_equal(back[key], layer[key])


def test_codes_of_another_size_are_refused():
    packed = pack_codes(np.zeros((2, 8), np.uint8), 4)
    with pytest.raises(UserError, match=r"expected uint8 \[out, 5\] for 10 inputs of 4 bits"):
        unpack_codes(packed, 4, 10)


@pytest.mark.parametrize(
    "config",
    [
        QuantConfig(rank=0, bits={"proj_out": (8, 8)}, single_clip=("a",), full_precision=("b",)),
        QuantConfig.released(weight_bits=3, act_bits=5, rank=0),
        QuantConfig(rank=4),
        QuantConfig(rank=0, symmetric_weights=True),
        QuantConfig(rank=0, time_table=True, table_steps=(20, 50), time_entries=69),
        QuantConfig(rotation="hadamard", folded={"a": ("b", 8)}, rank=4),
    ],
)
def test_the_config_survives_json(config):
    assert read_quantization_config(json.loads(json.dumps(quantization_config(config)))) == config


@pytest.mark.parametrize(
    ("config", "version"),
    [
        (QuantConfig(rank=0), 1),
        (QuantConfig(rank=4), 2),
        (QuantConfig(rank=0, symmetric_weights=True), 3),
        (QuantConfig(rank=0, rotation="hadamard"), 3),
        (QuantConfig(rank=0, time_table=True, table_steps=(50,), time_entries=50), 3),
    ],
)
def test_older_readers_are_refused_only_what_they_do_not_know(config, version):
    assert quantization_config(config)["format_version"] == version


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 4}, "format_version=4, this program reads 1 to 3"),
        ({"rotation": {"kind": "hadamard", "largest_block": 512}}, "up to 512.* does up to 256"),
        ({"rotation": {"kind": "givens", "largest_block": 256}}, "rotation='givens'; expected one"),
        ({"format_version": 2}, "damaged .KeyError: 'rank'"),
        ({"format_version": 3, "time_table": {"entries": 9}}, "damaged .KeyError: 'steps'"),
        ({"time_table": {"entries": "9", "steps": [9]}}, "damaged .TypeError: time_table is"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'; only exports of this project"),
        ({"bits": {"weights": 9, "activations": 4}}, "expected .weight bits, activation bits"),
        ({"bits": None}, "damaged"),
        ({"clip_ratio": "abc"}, "clip_ratio is 'abc' in .*, expected a number above 0"),
        ({"clip_buckets": 2.5}, "clip_buckets is 2.5 in .*, expected a whole number from 1"),
        ({"include_zero": "false"}, "include_zero is 'false' in .*, expected true or false"),
        ({"format_version": 3, "time_table": {"entries": 9, "steps": 5}}, "damaged .TypeError"),
        ({"clip_index": "nearest"}, "clip_index='nearest'; expected one of"),
        ({"format_version": 2, "rank": 1.5}, "rank is 1.5 in .*, expected a whole number from 0"),
        ({"format_version": 3, "rank": True}, "rank is True in .*, expected a whole number from 0"),
        (
            {"format_version": 3, "act_range": "learned", "branch_input": "tokens"},
            "act_range='learned' with branch_input='tokens'",
        ),
        (
            {"format_version": 3, "outliers": {"kept": 8}, "grid": 2},
            "has grid, outliers, which .* install the version that wrote",
        ),
    ],
)
def test_unknown_formats_are_refused(changes, message):
    fields = quantization_config(QuantConfig(rank=0)) | changes
    with pytest.raises(UserError, match=message):
        read_quantization_config(fields)


@pytest.mark.parametrize("fields", [[1], "int4", 4])
def test_a_config_that_is_no_object_is_refused(fields):
    with pytest.raises(UserError, match=r"quantization_config is .*, expected an object"):
        read_quantization_config(fields)
