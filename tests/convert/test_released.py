"""Released QVGen checkpoints in and out: whole tiny models against the release's own numbers.

The golden files come from tests/golden/make_released_models.py. Tolerance: 5e-6 of the largest
value, float32 rounding through two blocks; the inputs lie away from every rounding boundary, so
that all codes must be equal.
"""

import shutil
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.__main__ import main
from convert.load import read_transformer
from convert.released import holds_released, import_released
from convert.released_export import export_released
from convert.released_options import ReleasedOptions, recorded
from convert.save import write_json
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.errors import UserError
from qvgen_jax.quant.clips import countdown
from qvgen_jax.quant.code_planes import unpack_codes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.packed import read_quantization_config
from tests.convert.released_checkpoints import (
    COGVIDEOX,
    PHASE,
    WAN,
    Release,
    imported_last,
    read_packed,
    with_adapters,
)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return Release(tmp_path_factory.mktemp("wan"), "wan", WAN)


@pytest.fixture(scope="module")
def cogvideox(tmp_path_factory):
    return Release(tmp_path_factory.mktemp("cogvideox"), "cogvideox", COGVIDEOX)


@pytest.fixture(scope="module")
def imported(release):
    return imported_last(release)


@pytest.fixture(params=["wan", "cogvideox"])
def either(request, release, cogvideox):
    return {"wan": release, "cogvideox": cogvideox}[request.param]


def codes_of(folder: Path) -> dict[str, np.ndarray]:
    tensors = Tensors(folder)
    return {
        name: unpack_codes(array, 4, 2 * array.shape[1])
        for name, array in tensors.items()
        if name.endswith(".codes")
    }


def test_the_forward_is_that_of_the_released_inference(either):
    either.check("last", imported_last(either))


def test_a_packed_transformer_is_read_as_any_other(release, imported):
    model = read_transformer(imported / "transformer", jnp.float32)
    expected = read_packed(imported / "transformer")(*release.inputs("last"))
    np.testing.assert_array_equal(model(*release.inputs("last")), expected)


def test_the_forward_is_that_of_the_released_training(release, tmp_path):
    import_released(release.source, release.base, tmp_path / "ours", clip_index="t_mod_50")
    release.check("t_mod_50", tmp_path / "ours")


def test_by_default_the_clips_count_down_as_in_the_released_scripts(either, tmp_path):
    import_released(either.source, either.base, tmp_path / "ours")
    config = read_json(tmp_path / "ours" / "transformer" / "config.json")
    assert config["quantization_config"]["clip_index"] == "countdown"
    for call in (0, 1, 49, 60):
        index = countdown(jnp.full((1,), call))
        either.check("countdown", tmp_path / "ours", f"call_{call}", clip_index=index)


def check_step(release: Release, folder: Path, step: int, rank: int) -> None:
    moment = {"released_step": step, "phase_steps": PHASE}
    import_released(release.source, release.base, folder, clip_index="last", **moment)
    config = read_json(folder / "transformer" / "config.json")["quantization_config"]
    assert (config["format_version"], config["rank"]) == (2, rank)
    release.check(f"step_{step}", folder)


@pytest.mark.parametrize(("step", "rank"), [(2, 4), (6, 2), (8, 2), (17, 1)])
def test_rank_and_gate_of_a_step_are_rebuilt(release, tmp_path, step, rank):
    check_step(release, tmp_path / "ours", step, rank)


def test_rank_and_gate_of_a_cogvideox_step_are_rebuilt(cogvideox, tmp_path):
    check_step(cogvideox, tmp_path / "ours", step=8, rank=2)


def test_without_a_step_the_branch_is_left_away_as_in_the_released_inference(release, imported):
    assert "proj_out.wquantizer.L" in Tensors(release.source)
    assert not any(
        name.endswith((".L", ".R", ".gate")) for name in Tensors(imported / "transformer")
    )


@pytest.mark.parametrize(("case", "alpha"), [("adapter", None), ("adapter_alpha", 2.0)])
def test_adapters_are_merged(release, tmp_path, case, alpha):
    source = with_adapters(release)
    import_released(source, release.base, tmp_path / "ours", clip_index="last", lora_alpha=alpha)
    release.check(case, tmp_path / "ours")


def test_what_an_import_was_asked_for_is_on_record(release, tmp_path):
    def record_of(source: Path, name: str, **asked) -> ReleasedOptions:
        import_released(source, release.base, tmp_path / name, **asked)
        fields = read_json(tmp_path / name / "transformer" / "config.json")["quantization_config"]
        return recorded(fields, read_quantization_config(fields))

    assert record_of(release.source, "plain") == ReleasedOptions()
    # T of the published recipe is put on record where it was not given.
    branch = record_of(release.source, "branch", clip_index="last", released_step=2)
    assert branch == ReleasedOptions(clip_index="last", released_step=2, phase_steps=444)
    merged = record_of(with_adapters(release), "merged", lora_alpha=2.0)
    assert merged == ReleasedOptions(lora_alpha=2.0)


def test_a_folder_without_a_record_was_imported_without_options_and_a_damaged_one_is_refused():
    quant = QuantConfig.released(rank=0, clip_index="last")
    assert recorded({}, quant) == ReleasedOptions(clip_index="last")
    for record in ([], {"released_step": "2"}, {"phase_steps": True}, {"lora_alpha": [1.0]}):
        with pytest.raises(UserError, match="expected an object with the numbers released_step"):
            recorded({"released": record}, quant)


def test_a_bfloat16_checkpoint_gets_the_codes_of_a_bfloat16_pipeline(either, tmp_path):
    def halve(tensors):
        tensors |= {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}

    source = either.checkpoint("half", halve)
    import_released(source, either.base, tmp_path / "ours")
    codes, weights = codes_of(tmp_path / "ours" / "transformer"), Tensors(source)
    ours = [codes[name][:, : weights[f"{name[:-5]}w"].shape[1]] for name in sorted(codes)]
    np.testing.assert_array_equal(
        np.concatenate([part.ravel() for part in ours]), either.golden["bfloat16_codes"]
    )


def test_layers_without_a_scale_stay_in_full_precision(release, imported):
    config = read_json(imported / "transformer" / "config.json")["quantization_config"]
    name = "condition_embedder.time_proj"
    assert config["full_precision"] == [name]
    weight = Tensors(imported / "transformer")[f"{name}.weight"]
    np.testing.assert_array_equal(weight, Tensors(release.source)[f"{name}.weight"])


def test_everything_else_comes_from_the_base_and_the_licence_from_the_checkpoint(imported):
    assert read_json(imported / "vae" / "config.json") == {"z_dim": 4}
    assert (imported / "transformer" / "LICENSE").read_text() == "the checkpoint's licence"


def test_the_released_code_computes_our_forward_from_our_export(either):
    """Golden: their inference over the weights of our import and export."""
    either.check("exported", imported_last(either))


def test_every_name_and_shape_that_does_not_fit_is_told_at_once(release, tmp_path):
    def damage(tensors):
        for i in range(2):
            del tensors[f"blocks.{i}.attn1.to_q.aquantizer.upper"]
        tensors["blocks.1.ffn.net.2.w"] = tensors["blocks.1.ffn.net.2.w"][:, 1:]
        tensors["proj_out.wquantizer.ps"] = np.ones(3, np.float32)
        for leaf in ("wquantizer.L", "wquantizer.R", "wquantizer.scale", "wquantizer.zero_point"):
            del tensors[f"blocks.0.attn1.to_k.{leaf}"]
        for leaf in ("aquantizer.upper", "aquantizer.lower"):
            del tensors[f"blocks.0.attn1.to_k.{leaf}"]

    source = release.checkpoint("damaged", damage)
    with pytest.raises(UserError) as error:
        import_released(source, release.base, tmp_path / "ours")
    for part in (
        "2 tensors missing [blocks.{0-1}.attn1.to_q.aquantizer.upper]",
        "1 unexpected [proj_out.wquantizer.ps]",
        "blocks.1.ffn.net.2.w is [24, 34], expected [24, 35]",
        "[blocks.0.attn1.to_k.w] not quantized, but the same linear of other blocks",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("bits", "looks"), [(3, "more"), (6, "fewer")])
def test_a_wrong_number_of_bits_is_noticed(release, tmp_path, bits, looks):
    with pytest.raises(UserError, match=f"bits={bits}.*looks like one of {looks} bits"):
        import_released(release.source, release.base, tmp_path / "ours", bits=(bits, bits))
    assert not (tmp_path / "ours").exists()


def test_arguments_that_the_checkpoint_has_no_use_for_are_refused(release, imported, tmp_path):
    with pytest.raises(UserError, match="holds no adapters"):
        import_released(release.source, release.base, tmp_path / "ours", lora_alpha=2.0)
    export_released(imported, tmp_path / "theirs")
    with pytest.raises(UserError, match="has no L and R"):
        import_released(tmp_path / "theirs", release.base, tmp_path / "ours", released_step=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lora-alpha", "nan"], "--lora-alpha is nan, expected a finite number above 0"),
        (["--lora-alpha", "inf"], "--lora-alpha is inf, expected a finite number above 0"),
        (["--lora-alpha", "-1"], "--lora-alpha is -1.0, expected a finite number above 0"),
        (["--released-step", "-3"], "--released-step is -3, expected the number of steps trained"),
        (["--released-step", "3", "--phase-steps", "0"], "--phase-steps is 0, expected the steps"),
        (["--bits", "4,9"], "--bits is 4,9, expected weights,activations of 2 to 8 each"),
    ],
)
def test_a_number_out_of_its_range_is_told_by_its_option(release, tmp_path, capsys, words, message):
    target = tmp_path / "ours"
    words = ["import", str(release.source), str(target), "--base", str(release.base), *words]
    assert main(words) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not target.exists()


def test_a_packed_base_is_refused(release, imported, tmp_path):
    with pytest.raises(UserError, match="is packed; give the full-precision pipeline as base"):
        import_released(release.source, imported, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_another_base_is_refused(release, tmp_path):
    source = release.checkpoint("other", lambda tensors: None)
    write_json(source / "config.json", WAN | {"num_layers": 3})
    with pytest.raises(UserError, match="describe different models"):
        import_released(source, release.base, tmp_path / "ours")


def test_a_partial_of_another_conversion_is_left_alone(release, imported, tmp_path):
    partial = tmp_path / "target.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("keep me")
    for convert in (
        lambda: import_released(release.source, release.base, tmp_path / "target"),
        lambda: export_released(imported, tmp_path / "target"),
    ):
        with pytest.raises(UserError, match="another conversion left unfinished"):
            convert()
    assert (partial / "notes.txt").read_text() == "keep me"


def test_an_interrupted_released_import_starts_again(release, tmp_path):
    with pytest.raises(UserError, match="looks like one of more bits"):
        import_released(release.source, release.base, tmp_path / "ours", bits=(3, 3))
    (tmp_path / "ours.partial" / "transformer" / "stale.txt").write_text("")
    with pytest.raises(UserError, match="another conversion left unfinished"):
        export_released(imported_last(release), tmp_path / "ours")
    import_released(release.source, release.base, tmp_path / "ours")
    names = {path.name for path in (tmp_path / "ours").rglob("*")}
    assert not names & {"stale.txt", "progress.jsonl"}


def test_a_pipeline_with_stray_weights_beside_its_index_is_read_from_transformer(release, tmp_path):
    folder = tmp_path / "pipeline"
    shutil.copytree(release.source, folder / "transformer")
    write_json(folder / "model_index.json", {})
    write_tensors(folder / "stray.safetensors", {"a": np.ones(1)})
    assert holds_released(folder)
