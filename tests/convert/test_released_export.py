"""Packed models under the release's names: what comes back, and what is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from convert.released import import_released
from convert.released_export import export_released
from convert.released_names import is_released
from convert.save import write_json
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig, quantizable
from tests.convert.released_checkpoints import (
    BUCKETS,
    PHASE,
    WAN,
    WEIGHTS,
    Release,
    imported_last,
)

NAMES = quantizable(WanConfig())


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return Release(tmp_path_factory.mktemp("wan"), "wan", WAN)


@pytest.fixture(scope="module")
def imported(release):
    return imported_last(release)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_and_import_give_the_same_codes(release, imported, tmp_path, dtype):
    export_released(imported, tmp_path / "theirs", dtype=dtype)
    exported = Tensors(tmp_path / "theirs")
    assert is_released(exported)
    assert exported["proj_out.w"].dtype == dtype
    # A bfloat16 pipeline keeps the time embedder in float32.
    embedder = "condition_embedder.time_embedder.linear_1"
    assert exported[f"{embedder}.w"].dtype == np.float32
    assert (tmp_path / "theirs" / "LICENSE").read_text() == "the checkpoint's licence"

    import_released(tmp_path / "theirs", release.base, tmp_path / "ours", clip_index="last")
    once, twice = Tensors(imported / "transformer"), Tensors(tmp_path / "ours" / "transformer")
    assert set(once) == set(twice)
    # Half a unit in the last of bfloat16's 8 places, and rarely one where no number leads there.
    tolerance = 0 if dtype == "float32" else 2**-7
    for name, array in once.items():
        if name.endswith((".codes", ".clips")):
            np.testing.assert_array_equal(twice[name], array)
        else:
            scale = np.abs(array.astype(np.float32)).max()
            np.testing.assert_allclose(twice[name], array, rtol=0, atol=tolerance * scale)


def as_trained_by_us(folder: Path, target: Path, **changes) -> Path:
    """The packed folder with other settings of quantization, its clips once instead of twice."""
    shutil.copytree(folder, target)
    config = read_json(target / "transformer" / "config.json")
    config["quantization_config"] |= {"clip_ratio": 1.0, **changes}
    write_json(target / "transformer" / "config.json", config)
    tensors = dict(Tensors(target / "transformer"))
    for name in [name for name in tensors if name.endswith(".clips")]:
        kept = 0.95 / (1 + np.exp(-tensors[name].astype(np.float64)))
        tensors[name] = np.log(kept / (1 - kept)).astype(np.float32)
    write_tensors(target / "transformer" / WEIGHTS, tensors)
    return target


def test_clips_learned_by_us_keep_what_they_keep_under_the_released_constant(imported, tmp_path):
    ours = as_trained_by_us(imported, tmp_path / "ours")
    export_released(ours, tmp_path / "theirs", dtype="float32")
    exported, before = Tensors(tmp_path / "theirs"), Tensors(imported / "transformer")
    for side, column in (("lower", 0), ("upper", 1)):
        clips = exported[f"proj_out.aquantizer.{side}"]
        np.testing.assert_allclose(clips, before["proj_out.clips"][:, column], rtol=1e-4)


def test_one_clip_pair_becomes_fifty(imported, tmp_path):
    ours = shutil.copytree(imported, tmp_path / "ours") / "transformer"
    config = read_json(ours / "config.json")
    config["quantization_config"]["single_clip"] = ["proj_out"]
    write_json(ours / "config.json", config)
    tensors = dict(Tensors(ours))
    tensors["proj_out.clips"] = tensors["proj_out.clips"][:1]
    write_tensors(ours / WEIGHTS, tensors)
    export_released(tmp_path / "ours", tmp_path / "theirs", dtype="float32")
    upper = Tensors(tmp_path / "theirs")["proj_out.aquantizer.upper"]
    np.testing.assert_array_equal(upper, np.repeat(tensors["proj_out.clips"][0, 1], BUCKETS))


def test_what_the_released_code_would_compute_differently_is_refused_unless_asked(
    imported, tmp_path
):
    changes = {"include_zero": True, "clip_index": "bucket"}
    ours = as_trained_by_us(imported, tmp_path / "ours", **changes)
    tensors = dict(Tensors(ours / "transformer"))
    tensors["proj_out.clips"] = np.full_like(tensors["proj_out.clips"], 9.0)
    write_tensors(ours / "transformer" / WEIGHTS, tensors)
    reasons = (
        "one side of 0 .*; the timestep chooses .*; clips keep more than 0.95.*: proj_out.clips; "
        "to write it all the same, add --approximate"
    )
    with pytest.raises(UserError, match=reasons):
        export_released(ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    export_released(ours, tmp_path / "theirs", approximate=True)
    assert is_released(Tensors(tmp_path / "theirs"))


def with_learned_steps(folder: Path, target: Path, act_range: str) -> Path:
    """The packed folder with steps in the place of its clips."""
    shutil.copytree(folder, target)
    config = read_json(target / "transformer" / "config.json")
    config["quantization_config"] |= {"format_version": 3, "act_range": act_range}
    write_json(target / "transformer" / "config.json", config)
    tensors = dict(Tensors(target / "transformer"))
    for name in [name for name in tensors if name.endswith(".clips")]:
        clips, stem = tensors.pop(name), name.removesuffix(".clips")
        tensors[f"{stem}.act_scale"] = np.exp(clips[:, 0])
        if act_range == "learned_zero":
            tensors[f"{stem}.act_zero_point"] = clips[:, 1]
    write_tensors(target / "transformer" / WEIGHTS, tensors)
    return target


@pytest.mark.parametrize("act_range", ["learned", "learned_zero"])
def test_learned_steps_are_refused_before_clips_are_looked_for(imported, tmp_path, act_range):
    ours = with_learned_steps(imported, tmp_path / "ours", act_range)
    with pytest.raises(UserError, match=r"learned steps.*--config.quant.act_range=token"):
        export_released(ours, tmp_path / "theirs", approximate=True)
    assert not (tmp_path / "theirs").exists()


def test_what_the_released_code_cannot_run_is_refused(release, imported, tmp_path):
    bits = {"proj_out": {"weights": 4, "activations": 8}}
    ours = as_trained_by_us(imported, tmp_path / "ours", bits_by_layer=bits)
    with pytest.raises(
        UserError, match=r"bits of their own: proj_out \(train with --config.quant.bits=\(\)\)"
    ):
        export_released(ours, tmp_path / "theirs", approximate=True)
    rotation = {"kind": "hadamard", "largest_block": 256}
    rotated = as_trained_by_us(imported, tmp_path / "rotated", format_version=3, rotation=rotation)
    with pytest.raises(UserError, match=r"tokens are rotated .*--config.quant.rotation=none"):
        export_released(rotated, tmp_path / "theirs", approximate=True)
    folded = {name: {"into": "proj_out", "head_width": 8} for name in NAMES}
    smoothing = {"format_version": 3, "smoothing": 0.5, "folded": folded}
    smoothed = as_trained_by_us(imported, tmp_path / "smoothed", **smoothing)
    with pytest.raises(UserError, match=r"tokens are smoothed .*--config.quant.smoothing=0"):
        export_released(smoothed, tmp_path / "theirs", approximate=True)
    moment = {"released_step": 2, "phase_steps": PHASE}
    import_released(release.source, release.base, tmp_path / "branch", **moment)
    with pytest.raises(UserError, match=r"low-rank branch .*without --released-step"):
        export_released(tmp_path / "branch", tmp_path / "theirs", approximate=True)
    with pytest.raises(UserError, match="is in full precision"):
        export_released(release.base, tmp_path / "theirs")
