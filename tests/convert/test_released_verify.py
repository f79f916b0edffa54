"""The certificate of a packed import: what it says of a true one, and of every kind of damage."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from convert import released_arithmetic as arithmetic
from convert import released_formula as formula
from convert.__main__ import main
from convert.certificate import as_table
from convert.released import import_released
from convert.released_export import export_released
from convert.released_verify import verify_released
from convert.save import write_json
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.errors import UserError
from tests.convert.released_checkpoints import (
    COGVIDEOX,
    PHASE,
    WAN,
    WEIGHTS,
    Release,
    imported_last,
    with_adapters,
)

Q = "blocks.{}.attn1.to_q"
ODD = "blocks.0.ffn.net.2"  # 35 inputs: half of its last byte is padding.


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return Release(tmp_path_factory.mktemp("wan"), "wan", WAN)


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    return Release(tmp_path_factory.mktemp("cogvideox"), "cogvideox", COGVIDEOX)


@pytest.fixture(params=["wan", "cogvideox"])
def either(request, release, cogvideox):
    return {"wan": release, "cogvideox": cogvideox}[request.param]


@pytest.fixture(scope="module")
def imported(release):
    return imported_last(release)


@pytest.fixture(scope="module")
def branch(release):
    """Imported at a phase boundary, where L and R are refactored: rank 4 becomes 2."""
    folder = release.root / "branch"
    import_released(release.source, release.base, folder, released_step=PHASE, phase_steps=PHASE)
    return folder


def in_bfloat16(release: Release) -> Path:
    def halve(tensors):
        tensors |= {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}

    return release.checkpoint("half", halve)


def damaged(folder: Path, target: Path, change) -> Path:
    """A copy of a packed pipeline whose tensors `change` has changed."""
    shutil.copytree(folder, target)
    tensors = {name: array.copy() for name, array in Tensors(target / "transformer").items()}
    change(tensors)
    write_tensors(target / "transformer" / WEIGHTS, tensors)
    return target


def differing(certificate: dict) -> set[str]:
    return {name for name, found in certificate["tensors"].items() if not found["equal"]}


def test_a_true_import_gets_a_certificate_of_zeros(either):
    packed = imported_last(either)
    certificate = verify_released(either.source, either.base, packed)
    assert certificate == json.loads((packed / "certificate.json").read_text())
    assert certificate["equal"]
    counts = certificate["counts"]
    assert counts["equal"] == counts["tensors"] == len(Tensors(packed / "transformer"))
    assert counts["codes"] == either.golden["bfloat16_codes"].size
    assert counts["codes_that_differ"] == 0
    # The release's weights are rounded twice, each time by half of float32's last place.
    assert 0 < counts["max_relative_weight_error"] < 2 * 2**-24
    assert set(certificate["files"].values()) == {"equal"}
    assert certificate["options"]["clip_index"] == "last"
    assert certificate["config"] == []


def test_in_bfloat16_the_codes_are_equal_and_weights_differ_by_its_rounding(either, tmp_path):
    source = in_bfloat16(either)
    import_released(source, either.base, tmp_path / "ours")
    counts = verify_released(source, either.base, tmp_path / "ours")["counts"]
    assert counts["equal"] == counts["tensors"]
    # Half of bfloat16's last place is 2^-8.
    assert 2**-10 < counts["max_relative_weight_error"] < 2 * 2**-8


@pytest.mark.parametrize("step", [0, 2, 5, 6, 8, 12, 17, 18])
def test_a_rebuilt_branch_is_checked_at_the_recorded_step(either, tmp_path, step):
    packed = tmp_path / "ours"
    moment = {"released_step": step, "phase_steps": PHASE}
    import_released(either.source, either.base, packed, **moment)
    certificate = verify_released(either.source, either.base, packed)
    assert certificate["equal"], as_table(certificate)
    rank = read_json(packed / "transformer" / "config.json")["quantization_config"].get("rank", 0)
    assert rank == {0: 4, 1: 2, 2: 1, 3: 0}[step // PHASE]
    found = certificate["tensors"]
    assert ("proj_out.L" in found) == (rank > 0)
    if rank:
        refactored = "tolerance" in found["proj_out.L"]
        assert refactored == (step in (6, 12))
        assert found["proj_out.L"]["max_relative_error"] < 1e-6


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_merged_adapters_are_checked_with_the_recorded_alpha(release, tmp_path, alpha):
    source, packed = with_adapters(release), tmp_path / "ours"
    import_released(source, release.base, packed, lora_alpha=alpha)
    assert verify_released(source, release.base, packed)["equal"]
    other = verify_released(source, release.base, packed, lora_alpha=1.5)
    assert other["counts"]["codes_that_differ"] > 100
    assert other["config"] == [f"lora_alpha is {alpha}, expected 1.5"]


def test_the_formulas_give_the_codes_of_the_released_code(either):
    """Golden: the codes of their quantizer in a bfloat16 pipeline."""
    tensors, codes = Tensors(in_bfloat16(either)), []
    for name in sorted(name[:-2] for name in tensors if name.endswith(".w")):
        if f"{name}.wquantizer.scale" not in tensors:
            continue
        dtype = np.float32 if "time_embedder" in name else ml_dtypes.bfloat16
        weight, scale, zero_point = (
            tensors[f"{name}.{leaf}"].astype(dtype)
            for leaf in ("w", "wquantizer.scale", "wquantizer.zero_point")
        )
        size = weight.shape[1], 4
        levels = (formula.grad_scale(levels, *size) for levels in (scale, zero_point))
        codes.append(formula.quant(weight, *levels, bits=4).ravel())
    np.testing.assert_array_equal(np.concatenate(codes), either.golden["bfloat16_codes"])


def flip_a_code(tensors):
    tensors[f"{Q.format(1)}.codes"][3, 2] ^= 0x10


def fill_the_padding(tensors):
    tensors[f"{ODD}.codes"][0, -1] |= 0x80


def change_a_scale(tensors):
    scale = tensors[f"{Q.format(1)}.scale"]
    scale[5] = np.nextafter(scale[5], np.float32(1))


def change_a_zero_point(tensors):
    tensors[f"{Q.format(0)}.zero_point"][0] += 0.01


def exchange_the_clips(tensors):
    tensors["proj_out.clips"] = tensors["proj_out.clips"][:, ::-1]


def shift_a_bias(tensors):
    tensors["proj_out.bias"] = np.roll(tensors["proj_out.bias"], 1)


def change_a_norm(tensors):
    tensors["blocks.0.attn1.norm_q.weight"][0] += 1e-6


def round_a_matrix(tensors):
    name = "condition_embedder.time_proj.weight"
    tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)


def exchange_two_layers(tensors):
    for name in [name for name in tensors if name.startswith(f"{Q.format(0)}.")]:
        other = name.replace(".0.", ".1.", 1)
        tensors[name], tensors[other] = tensors[other], tensors[name]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (flip_a_code, {f"{Q.format(1)}.codes"}),
        (fill_the_padding, {f"{ODD}.codes"}),
        (change_a_scale, {f"{Q.format(1)}.scale"}),
        (change_a_zero_point, {f"{Q.format(0)}.zero_point"}),
        (exchange_the_clips, {"proj_out.clips"}),
        (shift_a_bias, {"proj_out.bias"}),
        (change_a_norm, {"blocks.0.attn1.norm_q.weight"}),
        (round_a_matrix, {"condition_embedder.time_proj.weight"}),
        (
            exchange_two_layers,
            {
                f"{Q.format(i)}.{leaf}"
                for i in (0, 1)
                for leaf in ("codes", "scale", "zero_point", "clips", "bias")
            },
        ),
    ],
)
def test_every_damage_is_found_and_nothing_else(release, imported, tmp_path, change, names):
    packed = damaged(imported, tmp_path / "damaged", change)
    certificate = verify_released(release.source, release.base, packed)
    assert not certificate["equal"]
    assert differing(certificate) == names
    assert certificate["missing"] == certificate["unexpected"] == []


def test_a_flipped_code_is_counted_and_measured(release, imported, tmp_path):
    packed = damaged(imported, tmp_path / "damaged", flip_a_code)
    certificate = verify_released(release.source, release.base, packed)
    found = certificate["tensors"][f"{Q.format(1)}.codes"]
    assert (found["codes_that_differ"], found["max_error"]) == (1, 1.0)
    scale = Tensors(packed / "transformer")[f"{Q.format(1)}.scale"]
    assert found["max_weight_error"] == pytest.approx(scale[3], rel=1e-5)
    layer = certificate["layers"]["blocks.1"]
    assert layer["codes_that_differ"] == certificate["counts"]["codes_that_differ"] == 1
    assert f"differs: {Q.format(1)}.codes, 1 of 576 codes, error 1" in as_table(certificate)


def test_missing_and_unexpected_tensors_are_named(release, imported, tmp_path):
    def change(tensors):
        del tensors["proj_out.codes"], tensors[f"{Q.format(0)}.scale"]
        tensors["proj_out.weight"] = np.ones(3, np.float32)
        tensors[f"{Q.format(1)}.codes"] = tensors[f"{Q.format(1)}.codes"][:, :-1]

    packed = damaged(imported, tmp_path / "damaged", change)
    certificate = verify_released(release.source, release.base, packed)
    assert certificate["missing"] == [f"{Q.format(0)}.scale", "proj_out.codes"]
    assert certificate["unexpected"] == ["proj_out.weight"]
    assert differing(certificate) == {f"{Q.format(1)}.codes"}
    # All codes of a tensor of another shape differ, and it stands for no weight.
    found = certificate["tensors"][f"{Q.format(1)}.codes"]
    assert (found["codes_that_differ"], found["max_weight_error"]) == (24 * 24, None)


def change_left(tensors):
    tensors["proj_out.L"][0, 0] *= 1.001


def double_left_and_halve_right(tensors):
    tensors["proj_out.L"] *= 2
    tensors["proj_out.R"] /= 2


def rotate(tensors):
    left, right = tensors["proj_out.L"], tensors["proj_out.R"]
    turn = np.array([[0.6, -0.8], [0.8, 0.6]], np.float32)
    tensors["proj_out.L"], tensors["proj_out.R"] = left @ turn, turn.T @ right


def change_the_gate(tensors):
    tensors["proj_out.gate"][1] -= 1e-5


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (change_left, {"proj_out.L", "proj_out.R"}),
        (double_left_and_halve_right, {"proj_out.L", "proj_out.R"}),
        (rotate, {"proj_out.L", "proj_out.R"}),
        (change_the_gate, {"proj_out.gate"}),
    ],
)
def test_a_refactored_branch_must_be_the_svd_form(release, branch, tmp_path, change, names):
    packed = damaged(branch, tmp_path / "damaged", change)
    certificate = verify_released(release.source, release.base, packed)
    assert not certificate["equal"]
    assert differing(certificate) == names


def test_the_signs_of_a_refactored_branch_are_free(release, branch, tmp_path):
    def turn(tensors):
        tensors["proj_out.L"][:, 1] *= -1
        tensors["proj_out.R"][1] *= -1

    packed = damaged(branch, tmp_path / "turned", turn)
    assert verify_released(release.source, release.base, packed)["equal"]


def test_other_options_than_the_recorded_ones_are_differences(release, imported, branch):
    other = verify_released(release.source, release.base, imported, clip_index="countdown")
    assert other["config"] == ["clip_index is 'last', expected 'countdown'"]
    assert other["files"]["transformer/config.json"] == "different"
    assert "transformer/config.json: clip_index is 'last'" in as_table(other)
    assert not other["equal"]
    assert differing(other) == set()
    narrow = verify_released(release.source, release.base, imported, bits=(3, 3))
    assert {name.rpartition(".")[2] for name in differing(narrow)} >= {"codes", "scale"}
    later = verify_released(release.source, release.base, branch, released_step=PHASE + 1)
    assert later["config"] == [f"released_step is {PHASE}, expected {PHASE + 1}"]
    assert {name.rpartition(".")[2] for name in differing(later)} == {"L", "R", "gate"}


def test_a_branch_of_an_import_without_a_record_needs_its_step(release, branch, tmp_path):
    packed = shutil.copytree(branch, tmp_path / "old")
    fields = read_json(packed / "transformer" / "config.json")
    del fields["quantization_config"]["released"]
    write_json(packed / "transformer" / "config.json", fields)
    with pytest.raises(UserError, match="does not say the step it was rebuilt for"):
        verify_released(release.source, release.base, packed)
    moment = {"released_step": PHASE, "phase_steps": PHASE}
    assert verify_released(release.source, release.base, packed, **moment)["equal"]


def test_other_files_must_be_those_of_the_base_and_the_checkpoint(release, imported, tmp_path):
    packed = shutil.copytree(imported, tmp_path / "packed")
    (packed / "vae" / "config.json").unlink()
    (packed / "transformer" / "LICENSE").write_text("other terms")
    (packed / "notes.txt").write_text("")
    fields = read_json(packed / "transformer" / "config.json")
    write_json(packed / "transformer" / "config.json", fields | {"ffn_dim": 36})
    certificate = verify_released(release.source, release.base, packed)
    assert certificate["files"] == {
        "model_index.json": "equal",
        "notes.txt": "unexpected",
        "transformer/LICENSE": "different",
        "transformer/config.json": "different",
        "vae/config.json": "missing",
    }
    assert certificate["config"] == ["ffn_dim is 36, expected 35"]


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("effective", {"codes", "scale", "zero_point"}),
        ("_round_to", {"codes", "scale", "zero_point"}),
        ("quantize", {"codes"}),
        ("merge_adapter", {"codes"}),
        ("branch_at", {"L", "R", "gate"}),
    ],
)
def test_a_mistake_in_the_arithmetic_of_the_import_is_found(
    release, tmp_path, monkeypatch, name, leaves
):
    """The check computes along its own path, or a mistake would agree with itself."""
    right = getattr(arithmetic, name)

    def shifted(*arguments):
        result = right(*arguments)
        return result._replace(codes=result.codes ^ 1)

    wrong = {
        "effective": lambda parameter, *rest: np.asarray(parameter, np.float32),
        "_round_to": lambda array, dtype: np.asarray(array, np.float32),
        "quantize": shifted,
        "merge_adapter": lambda weight, *rest: weight.astype(np.float32),
        "branch_at": lambda left, right_side, step, decay: right(left, right_side, 7, decay),
    }
    monkeypatch.setattr(arithmetic, name, wrong[name])
    source = with_adapters(release) if name == "merge_adapter" else in_bfloat16(release)
    moment = {"released_step": PHASE, "phase_steps": PHASE} if name == "branch_at" else {}
    import_released(source, release.base, tmp_path / "ours", **moment)
    certificate = verify_released(source, release.base, tmp_path / "ours")
    assert {name.rpartition(".")[2] for name in differing(certificate)} == leaves


def test_an_adapter_may_be_summed_in_any_order():
    rng = np.random.default_rng(0)
    weight, down, up = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((40, 60), (16, 60), (40, 16))
    )
    lowest, highest = formula.merge_lora(weight, down, up, 0.5)
    assert (highest - lowest).max() < 1e-4
    for order in (slice(None), slice(None, None, -1), rng.permutation(16)):
        product = np.zeros((40, 60), np.float32)
        for column, row in zip(up.T[order], down[order], strict=True):
            product += np.outer(column, row)
        merged = weight + product * np.float32(0.5)
        assert np.all((lowest <= merged) & (merged <= highest))


def test_an_export_is_checked_as_the_checkpoint_of_what_it_was_made_from(
    release, imported, tmp_path
):
    for dtype in ("float32", "bfloat16"):
        export_released(imported, tmp_path / dtype, dtype=dtype)
    exact = verify_released(tmp_path / "float32", release.base, imported)
    assert exact["equal"], as_table(exact)
    rounded = verify_released(tmp_path / "bfloat16", release.base, imported)
    assert rounded["counts"]["codes_that_differ"] == 0
    assert {name.rpartition(".")[2] for name in differing(rounded)} == {
        "scale",
        "zero_point",
        "bias",
    }


def test_the_command_ends_with_the_codes_it_promises(release, imported, tmp_path, capsys):
    words = ["verify", str(release.source), str(imported), "--base", str(release.base)]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "0 of 14,640 codes differ" in text
    assert "144 of 144 tensors equal to the bit, 4 other files; EQUAL" in text
    packed = damaged(imported, tmp_path / "damaged", flip_a_code)
    assert main([*words[:2], str(packed), *words[3:]]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out


def test_what_cannot_be_compared_is_told_in_one_line(release, imported, tmp_path, capsys):
    source, base, packed = (str(path) for path in (release.source, release.base, imported))
    export_released(imported, tmp_path / "theirs")
    adapters = str(with_adapters(release))
    for words, text in (
        ([source, packed], "--base FOLDER"),
        ([source, packed, "--base", packed], "give the full-precision pipeline as base"),
        ([base, packed], f"{packed} is packed; verify takes"),
        ([base, packed, "--base", base], "--base is only for a checkpoint of QVGen's release"),
        ([source, base, "--base", base, "--bits", "4,4"], "leave them away, or give `verify"),
        ([packed, str(tmp_path / "theirs")], "`verify CHECKPOINT PACKED --base BASE`"),
        ([source, packed, "--base", base, "--lora-alpha", "2"], "holds no adapters"),
        ([source, packed, "--base", base, "--bits", "4,9"], "--bits is 4,9, expected weights,"),
        ([adapters, packed, "--base", base, "--released-step", "3"], "has no L and R"),
        ([source, packed, "--base", base, "--phase-steps", "3"], "only --released-step rebuilds"),
    ):
        capsys.readouterr()
        assert main(["verify", *words]) == 2, words
        error = capsys.readouterr().err
        assert text in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_a_target_that_is_there_is_told_with_the_command_that_compares(release, imported, capsys):
    words = [str(release.source), str(imported), "--base", str(release.base)]
    assert main(["import", *words]) == 2
    assert f"python -m convert verify {' '.join(words)}" in capsys.readouterr().err
