"""Plans of the shipped configs word by word, and what they must add up to."""

import pytest

from configs import read_config
from qvgen_jax.errors import UserError
from qvgen_jax.plan.collectives import BETWEEN_SLICES
from qvgen_jax.plan.plan import Plan, make_plan
from qvgen_jax.plan.target import parse_target
from qvgen_jax.plan.text import as_text
from tests.golden.plans import FOLDER, TARGETS, planned


@pytest.mark.parametrize("name", TARGETS)
def test_a_shipped_config_has_the_plan_that_is_kept(name):
    # After a change that is meant: `python -m tests.golden.plans`, and read what it changed.
    assert planned(name) == (FOLDER / f"{name}.txt").read_text()


def test_a_rotation_is_counted_where_a_linear_does_it_itself():
    config = read_config("configs/wan14b_w4a4.py").to_dict()

    def rotations(**quant) -> dict[str, int]:
        asked = {**config, "quant": {**config["quant"], **quant}}
        work = make_plan(asked, parse_target("v5p:4x4x4"), compiler=False).work
        return {part: n for (part, kind), n in work.items() if kind == "rotation"}

    assert rotations(rotation="none") == {}
    counted = rotations(rotation="hadamard")
    assert counted["forward"] == counted["backward"]  # No weights, so no gradients of theirs.
    # 40 blocks: of the video q, k, v, the queries on the text and two linears of the ffn, of the
    # text k and v. No to_out: to_v rotates for it.
    video, text = 13 * 30 * 52, 512
    linears = 40 * video * 256 * (5 * 5120 + 13824) + 40 * text * 256 * 2 * 5120
    assert counted["forward"] == pytest.approx(linears, rel=0.01)


def two_slices(target: str = "2xv5p:4x4x4", batch: int = 128, parts: int = 1, **across) -> Plan:
    config = read_config("configs/wan14b_w4a4.py").to_dict()
    config["mesh"]["across_slices"] |= across
    config["train"] |= {"batch_size": batch, "accumulate": parts}
    return make_plan(config, parse_target(target), compiler=False)


def between(plan: Plan) -> int:
    return sum(c.bytes for c in plan.moved if c.kind == BETWEEN_SLICES)


def test_copies_in_two_slices_meet_in_their_gradients_alone():
    plan = two_slices(data=2)
    assert (plan.sizes["data"], plan.sizes["fsdp"]) == (2, 64)
    # Each device's 64th of the gradients, once there and once back, of which half is its own.
    assert between(plan) == pytest.approx(4 * plan.parameters[0] / 64, rel=0.01)
    assert not [c for c in plan.moved if c.kind == "all-reduce"]  # Not counted twice.
    told = as_text(plan, "")
    assert "over the network between 2 slices: data 2" in told
    assert "of 600 GB/s a device, 6.25 between slices" in told


def test_who_holds_the_same_shares_the_way_and_every_part_of_a_batch_goes_it():
    """As libtpu 0.0.48.1 compiles the tiny step: context 2 halves it, two parts double it."""
    whole, shared = two_slices(data=2), two_slices(batch=64, data=2)
    assert (shared.sizes["fsdp"], shared.sizes["context"]) == (32, 2)
    assert between(shared) == between(whole)
    assert between(two_slices(batch=256, parts=2, data=2)) == 2 * between(whole)


def test_one_copy_over_two_slices_has_less_state_and_more_to_fetch():
    cut, copied = two_slices(fsdp=2), two_slices(data=2)
    assert (cut.sizes["data"], cut.sizes["fsdp"]) == (1, 128)
    # Not half: a 128th of 5120 channels is 40, where a TPU's tile has 128.
    assert copied.memory.master / 2 < cut.memory.master < 0.7 * copied.memory.master
    every, quantized = cut.parameters
    # Codes twice, the teacher in bfloat16 and gradients in float32; half of each is far away.
    far = (2 * quantized + 2 * every + 4 * every) / 2 / 64
    assert between(cut) == pytest.approx(far, rel=0.02)


@pytest.mark.parametrize(
    ("target", "across"), [("2xv5p:4x4x4", {}), ("v5p:4x4x4", {"data": 2}), ("4xv5p:2x2x2", {})]
)
def test_slices_that_the_mesh_does_not_have_are_told(target, across):
    with pytest.raises(UserError, match=r"mesh.across_slices is .*; set --config.mesh.across"):
        two_slices(target, **across)
