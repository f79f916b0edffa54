"""Bytes, bytes moved and seconds of a plan, by hand."""

import json

import pytest

from benchmarks import ahead
from configs import read_config
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import sizes_of_config
from qvgen_jax.plan.collectives import Collective
from qvgen_jax.plan.memory import estimate, in_tiles
from qvgen_jax.plan.pace import SHARE_OF_LINKS, UTILISATION, pace
from qvgen_jax.plan.plan import make_plan
from qvgen_jax.plan.shapes import read_run
from qvgen_jax.plan.target import parse_target
from qvgen_jax.plan.traffic import estimated, kernel_sizes
from qvgen_jax.plan.verdict import verdict

ONE = {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}


def config(name="wan1_3b_w4a4", **sections):
    found = read_config(f"configs/{name}.py").to_dict()
    for section, values in sections.items():
        found[section] = {**found.get(section, {}), **values}
    return found


def of(sizes, **sections):
    return estimate(read_run(config(**sections)), {**ONE, **sizes}, "gpu")


def test_weights_gradients_and_moments_are_what_the_parameters_weigh():
    whole = of({})
    every = kernel_sizes(read_run(config()))[1]
    # Beside the teacher's parameters: branches of rank 32, scales, zero points and clips.
    assert 4 * every < whole.master < 4.2 * every
    assert whole.gradients == whole.master
    assert whole.moments == pytest.approx(2 * whole.master, rel=1e-3)
    # Bfloat16 but for norms, biases and the timestep's path.
    assert 2 * every < whole.teacher < 2.03 * every


@pytest.mark.parametrize(
    ("name", "share"),
    # Of CogVideoX a sixth are linears of the timestep, which stay float32.
    [("wan1_3b_w4a4", 0.52), ("cogvideox2b_w4a4", 0.68), ("cogvideox1_5_5b_w4a4", 0.63)],
)
def test_a_teacher_of_bytes_takes_and_moves_less(name, share):
    runs = [read_run(config(name, train={"teacher_weights": how})) for how in ("float", "int8")]
    whole, held = (estimate(run, ONE, "gpu").teacher for run in runs)
    assert held == pytest.approx(share * whole, rel=0.02)
    moved = [sum(c.bytes for c in estimated(run, {**ONE, "fsdp": 16})) for run in runs]
    # A byte instead of two of what became codes: all but scales of what the memory lost.
    assert moved[0] - moved[1] == pytest.approx((whole - held) * 15 / 16, rel=0.02)


def test_a_block_that_smooths_or_rotates_holds_more_of_its_tokens():
    bare = {"rotation": "none", "smoothing": 0.0}
    held = [
        of({}, quant=changed).temporaries
        for changed in (bare, {**bare, "smoothing": 0.5}, {**bare, "rotation": "hadamard"}, {})
    ]
    assert held[0] < held[1] == held[2] == held[3]


def test_of_several_buckets_the_largest_counts():
    sizes = ("17x480x832", "49x480x832", "49x832x320")
    several = of({}, data={"buckets": sizes, "num_frames": 5, "height": 32, "width": 32})
    assert several == of({})  # 49 x 480 x 832.
    assert several.activations > of({}, data={"buckets": sizes[:1]}).activations


def test_fsdp_cuts_what_lasts_and_data_copies_it():
    whole, cut, copied = of({}), of({"fsdp": 16}), of({"data": 16})
    # Vectors are whole on every device.
    assert cut.teacher == pytest.approx(whole.teacher / 16, rel=0.03)
    for part in ("master", "moments", "gradients"):
        # One side of a branch goes over `tensor` alone, so that a little more than a part is left.
        assert 1 < 16 * getattr(cut, part) / getattr(whole, part) < 1.4
        assert getattr(copied, part) == getattr(whole, part)
    assert cut.activations == copied.activations == whole.activations / 16


@pytest.mark.parametrize(
    ("shape", "elements"),
    [
        ((30, 7680, 30), 30 * 7680 * 32),  # 30 rows of 7680, whatever order they are named in.
        ((40, 13824, 32), 40 * 13824 * 32),
        ((3, 256), 4 * 256),
        ((50,), 50),
        ((), 1),
    ],
)
def test_an_array_on_a_tpu_fills_whole_tiles(shape, elements):
    assert in_tiles(shape) == elements


@pytest.mark.parametrize(
    "row", [row for row in ahead.ROWS if row.program == "step"], ids=lambda row: row.name
)
def test_arguments_are_within_half_a_percent_of_what_the_compiler_found(row):
    found = json.loads(ahead.RESULTS.read_text())[row.name]["arguments"]
    assert ahead.estimated(row).arguments == pytest.approx(found, rel=0.005)


def test_every_policy_keeps_what_it_says():
    kept = {p: of({}, train={"remat": p}) for p in ("none", "attention", "blocks", "offload")}
    sizes = [kept[p].activations for p in ("none", "attention", "blocks", "offload")]
    assert sizes == sorted(sizes, reverse=True)
    assert kept["offload"].activations == 0
    assert kept["offload"].host == kept["attention"].activations
    samples, tokens, layers, dim, heads = 48, 20280, 30, 1536, 12
    assert kept["blocks"].activations == samples * tokens * layers * dim * 2
    more = kept["attention"].activations - kept["blocks"].activations
    assert more == samples * tokens * layers * (dim * 2 + heads * 4)


def test_context_pads_tokens_to_whole_blocks():
    shared = of({"fsdp": 16, "context": 4})
    padded = 40 * 4 * 128  # 20,280 and 200 behind them.
    assert shared.activations == 3 * padded // 4 * 30 * 1536 * 2


@pytest.mark.parametrize(
    ("devices", "asked", "expected"),
    [
        (64, {}, (1, 16, 4, 1)),  # 48 samples divide by 16.
        (16, {}, (1, 16, 1, 1)),
        (64, {"data": 2, "fsdp": -1, "context": 0, "tensor": 2}, (2, 8, 2, 2)),
        (8, {"data": 1, "fsdp": 4, "context": 0, "tensor": 1}, (1, 4, 2, 1)),
    ],
)
def test_the_mesh_shares_a_sample_among_as_few_devices_as_it_can(devices, asked, expected):
    assert tuple(sizes_of_config(config(mesh=asked), devices).values()) == expected


@pytest.mark.parametrize(
    ("devices", "asked", "message"),
    [
        (8, {"fsdp": 3, "context": 1}, "3 devices, and there are 8"),
        (32, {"fsdp": 32, "context": 1}, "48 samples .* do not divide over data x fsdp = 32"),
    ],
)
def test_a_mesh_that_does_not_divide_is_one_message(devices, asked, message):
    with pytest.raises(UserError, match=message):
        sizes_of_config(config(mesh={"data": 1, "tensor": 1} | asked), devices)


def test_a_parameter_that_does_not_divide_is_named():
    with pytest.raises(UserError, match="does not divide over the mesh"):
        of({"fsdp": 7})


def test_a_step_gathers_codes_twice_the_teacher_once_and_scatters_gradients():
    run = read_run(config())
    moved = {(c.kind, c.dtype): c.bytes for c in estimated(run, {**ONE, "fsdp": 16})}
    quantized, every = kernel_sizes(run)
    assert moved == {
        ("all-gather", "s8"): 2 * quantized * 15 // 16,
        ("all-gather", "bf16"): pytest.approx(2 * every * 15 / 16, abs=1),
        ("reduce-scatter", "f32"): pytest.approx(4 * every * 15 / 16, abs=1),
    }


def test_frozen_weights_have_no_gradients_to_scatter():
    baseline = read_run(read_config("configs/wan1_3b_w4a4.py:efficient_dm").to_dict())
    for axis in ("fsdp", "data"):
        found, whole = (
            {c.kind: c.bytes for c in estimated(run, {**ONE, axis: 16}) if c.dtype == "f32"}
            for run in (baseline, read_run(config()))
        )
        assert found.keys() == whole.keys() != set()
        for kind, moved in found.items():  # What `test_frozen_weights_cost...` counts in memory.
            trained = moved / whole[kind] * kernel_sizes(baseline)[1]
            assert 4 * trained == pytest.approx(estimate(baseline, ONE, "gpu").gradients, rel=1e-6)


def test_a_step_takes_from_the_larger_to_the_sum_of_computing_and_moving():
    target = parse_target("v5p:2x2x1")
    moved = [Collective("all-gather", "s8", 4, 1, 600 * 10**9)]
    found = pace(target, 4 * 459e12, moved)  # A second at the peak, and one at all links.
    fast, slow = 1 / UTILISATION[1], 1 / UTILISATION[0]
    assert found.computing == pytest.approx((fast, slow))
    assert found.moving == pytest.approx((1 / SHARE_OF_LINKS[1], 1 / SHARE_OF_LINKS[0]))
    assert found.fast == pytest.approx(fast)
    assert found.slow == pytest.approx(slow + 1 / SHARE_OF_LINKS[0])


def test_what_does_not_fit_is_told_with_changes_that_do():
    plan = make_plan(config(), parse_target("v5e:4x4"), compiler=False)
    assert plan.fits is False
    text = verdict(plan)
    assert text.startswith("does not fit: ")
    changes = [line.strip() for line in text.splitlines()[1:]]
    assert {line.partition("=")[0] for line in changes} >= {"--config.train.accumulate", "--target"}
    name = next(x for x in changes if x.startswith("--target")).partition("=")[2].split(": ")[0]
    assert make_plan(config(), parse_target(name), compiler=False).fits


def test_what_fits_says_how_much_is_left_to_keep():
    plan = make_plan(config("wan14b_w4a4"), parse_target("v5p:4x4x4"), compiler=False)
    assert plan.fits
    assert "There is room for --config.train.remat=attention" in verdict(plan)


def test_frozen_weights_cost_their_own_bytes_alone():
    baseline = read_run(read_config("configs/wan1_3b_w4a4.py:efficient_dm").to_dict())
    found, whole = estimate(baseline, ONE, "gpu"), of({})
    every = kernel_sizes(baseline)[1]
    assert 4 * every < found.master < 4.2 * every
    # What trains: adapters of rank 32, scales, zero points and steps.
    assert found.gradients == pytest.approx(found.master - 4 * every, rel=0.01)
    assert found.moments == pytest.approx(2 * found.gradients, rel=0.02)
    assert found.teacher == whole.teacher


def test_a_plan_of_lsq_has_no_teacher_pass_and_a_merged_adapter_is_passed_by_no_token():
    target = parse_target("h100:8")
    work = {
        name: make_plan(
            read_config(f"configs/wan1_3b_w4a4.py:{name}").to_dict(), target, compiler=False
        ).work
        for name in ("", "lsq", "q_dm", "efficient_dm")
    }
    passes = {name: {where for where, _ in found} for name, found in work.items()}
    assert "teacher" not in passes["lsq"]
    assert "teacher" in passes["q_dm"]
    assert work["efficient_dm"] == work["q_dm"]
    assert ("forward", "branch") in work[""]
    assert ("forward", "branch") not in work["efficient_dm"]
