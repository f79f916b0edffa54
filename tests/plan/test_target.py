"""Names of targets: how many devices they are, and one message for what there is not."""

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.plan.target import parse_target


@pytest.mark.parametrize(
    ("text", "chips", "devices", "memory"),
    [
        ("v5p:4x4x4", 64, 64, 95e9),
        ("v6e:16x16", 256, 256, 32e9),
        ("v5e:1x1", 1, 1, 16e9),
        ("tpu7x:2x2x4", 16, 32, 96e9),
        ("2xv6e:16x16", 512, 512, 32e9),
        ("4xtpu7x:2x2x1", 16, 32, 96e9),
        ("h200:8", 8, 8, 141e9),
        ("h100:32", 32, 32, 80e9),
        ("rtx4090:1", 1, 1, 24e9),
    ],
)
def test_a_target_is_so_many_devices_of_so_much_memory(text, chips, devices, memory):
    target = parse_target(text)
    assert (target.chips, target.devices, target.memory) == (chips, devices, memory)
    assert target.peak * devices == pytest.approx(target.chip.bf16 * 1e12 * chips)


def test_without_a_name_it_is_this_machine():
    target = parse_target("")
    assert target.here
    assert target.chip.platform == "cpu"
    assert target.memory == target.peak == 0  # Not in a data sheet.
    assert target.grown() is None


@pytest.mark.parametrize(
    ("text", "larger"),
    [
        ("h200:8", "h200:16"),
        ("rtx4090:1", "rtx4090:2"),
        ("v5e:8x16", "v5e:16x16"),
        ("v6e:16x16", None),
        ("v5p:4x4x4", "v5p:4x4x8"),
        ("2xv5e:8x8", "2xv5e:8x16"),
        ("2xv6e:16x16", None),
    ],
)
def test_the_next_larger_target_has_twice_the_chips(text, larger):
    grown = parse_target(text).grown()
    assert (grown and grown.name) == larger
    assert grown is None or grown.chips == 2 * parse_target(text).chips


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v9:2x2", "no chip 'v9' is known; expected one of v5e, v5p"),
        ("cpu:4", "no chip 'cpu' is known"),
        ("h200", "expected a number of GPUs after the colon, as h200:8"),
        ("h100:0", "expected a number of GPUs"),
        ("h100:12", "12 GPUs are no whole nodes of 8; take 8 or another multiple"),
        ("v5p:64", "v5p is ordered by a grid of 3 sides, as in v5p:4x4x4"),
        ("v5e:4x4x4", "grid of 2 sides, as in v5e:4x4"),
        ("v6e:3x4", "the first two sides of a grid of v6e are even"),
        ("v6e:32x16", "at most 256 chips in all"),
        ("0xv6e:2x2", "no chip '0xv6e' is known"),
        ("2xh100:8", "only TPUs come in slices; give the number of all GPUs after the colon"),
    ],
)
def test_what_there_is_not_is_told_with_what_there_is(text, message):
    with pytest.raises(UserError) as error:
        parse_target(text)
    assert f"--target={text}: " in str(error.value)
    assert message in str(error.value)
