"""A plan's file: few entries, the same bits, and refusals."""

import pytest

from configs.tiny_w4a4 import get_config
from qvgen_jax.errors import UserError
from qvgen_jax.quant.bits_file import grouped, read_bits, with_bits_file, write_bits
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.training.check import check_config

BITS = {
    "proj_out": (8, 8),
    "blocks.0.ffn.up": (4, 4),
    "blocks.1.ffn.up": (8, 4),
    "blocks.2.ffn.up": (4, 4),
}


def test_what_most_blocks_have_is_said_once():
    assert grouped(BITS) == [
        ("proj_out", 8, 8),
        ("blocks.ffn.up", 4, 4),
        ("blocks.1.ffn.up", 8, 4),
    ]


def test_a_file_gives_every_layer_its_bits(tmp_path):
    write_bits(tmp_path / "bits.json", BITS, {"budget": "5 bits"})
    entries = read_bits(tmp_path / "bits.json")
    config = QuantConfig(bits={name: (w, a) for name, w, a in entries})
    found = [config.bits_of("blocks.ffn.up", block) for block in range(3)]
    assert found == [(4, 4), (8, 4), (4, 4)]
    assert config.bits_of("proj_out") == (8, 8)


def test_the_config_of_a_run_holds_the_bits_and_not_the_file(tmp_path):
    file = tmp_path / "bits.json"
    write_bits(file, BITS, {})
    config = {"seed": 0, "quant": {"bits": (), "bits_file": str(file), "rank": 2}}
    found = with_bits_file(config)
    assert found["quant"] == {"bits": read_bits(file), "bits_file": "", "rank": 2}
    assert with_bits_file(found) == found
    assert with_bits_file({"quant": {"bits": (("a", 4, 4),)}})["quant"]["bits"] == (("a", 4, 4),)


@pytest.mark.parametrize("text", ["[]", "{}", '{"bits": [["a", 4]]}', '{"bits": [["a", 4, true]]}'])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "bits.json").write_text(text)
    with pytest.raises(UserError, match=r"give the bits.json that --job mixed wrote"):
        read_bits(tmp_path / "bits.json")


def test_a_layer_that_is_named_twice_is_refused(tmp_path):
    entries = '["a", 4, 4], ["b", 4, 4], ["a", 8, 8]'
    (tmp_path / "bits.json").write_text(f'{{"bits": [{entries}]}}')
    with pytest.raises(UserError, match=r"bits.json names a more than once"):
        read_bits(tmp_path / "bits.json")
    config = get_config().to_dict()
    config["quant"]["bits"] = (("proj_out", 4, 4), ("proj_out", 8, 8))
    with pytest.raises(UserError, match=r"quant.bits=.* names proj_out more than once; leave one"):
        check_config(config)


def test_bits_from_two_places_are_refused(tmp_path):
    quant = {"bits": (("proj_out", 8, 8),), "bits_file": str(tmp_path / "bits.json")}
    with pytest.raises(UserError, match="both say what layers get; leave one of them empty"):
        with_bits_file({"quant": quant})
