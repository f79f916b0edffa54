"""Released QVGen checkpoints in and out: whole tiny models against the release's own numbers.

The golden files come from tests/golden/make_released_models.py. Tolerance: 5e-6 of the largest
value, float32 rounding through two blocks; the inputs lie away from every rounding boundary, so
that all codes must be equal.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from convert.load import read_transformer
from convert.packed import from_packed, packed_definition
from convert.released import import_released
from convert.released_export import export_released
from convert.released_names import is_released
from convert.save import write_json
from convert.tables import table_for
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.components import Transformer
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json, quantizable
from qvgen_jax.quant.clips import countdown
from qvgen_jax.quant.packed import read_quantization_config, unpack_codes

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PHASE, BUCKETS = 6, 50
WAN = {
    "_class_name": "WanTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 35,
    "num_layers": 2,
}
COGVIDEOX = {
    "_class_name": "CogVideoXTransformer3DModel",
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 2,
    "out_channels": 2,
    "text_embed_dim": 6,
    "time_embed_dim": 8,
    "num_layers": 2,
    "sample_height": 8,
    "sample_width": 6,
    "max_text_seq_length": 5,
}
TOLERANCE = 5e-6


def read_packed(folder: Path) -> Transformer:
    """The packed transformer of either family."""
    fields = read_json(folder / "config.json")
    config, quant = (
        config_from_json(fields),
        read_quantization_config(fields["quantization_config"]),
    )
    graphdef, shapes, levels = packed_definition(config, quant, jnp.float32)
    params = from_packed(table_for(config), Tensors(folder), quantizable(config), quant, shapes)
    return Transformer(config, graphdef, (params, levels))


class Release:
    """The golden checkpoint of one family as a folder, its base pipeline, and what it computes."""

    def __init__(self, root: Path, family: str, fields: dict):
        self.root, self.base, self.source = root, root / "base", root / "checkpoint"
        write_json(self.base / "transformer" / "config.json", fields)
        write_json(self.base / "model_index.json", {"_class_name": "WanPipeline"})
        write_json(self.base / "vae" / "config.json", {"z_dim": 4})
        self.source.mkdir()
        shutil.copy(GOLDEN / f"released_{family}.safetensors", self.source / WEIGHTS)
        (self.source / "LICENSE").write_text("the checkpoint's licence")
        with np.load(GOLDEN / f"released_{family}.npz") as arrays:
            self.golden = dict(arrays)

    def inputs(self, case: str) -> list[np.ndarray]:
        return [self.golden[f"{case}/{key}"] for key in ("latents", "timesteps", "text")]

    def checkpoint(self, name: str, change) -> Path:
        """A folder with a changed copy of the checkpoint's tensors."""
        tensors = dict(Tensors(self.source))
        change(tensors)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        write_tensors(folder / WEIGHTS, tensors)
        return folder

    def check(self, case: str, folder: Path, key: str = "velocity", **arguments) -> None:
        expected = self.golden[f"{case}/{key}"]
        with jax.default_matmul_precision("highest"):
            ours = read_packed(folder / "transformer")(*self.inputs(case), **arguments)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


def imported_last(release: Release) -> Path:
    """The checkpoint imported with the clips of an inference without `--fix`."""
    folder = release.root / "last"
    if not folder.exists():
        import_released(release.source, release.base, folder, clip_index="last")
    return folder


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
    names = [name for name in release.golden if name.startswith("adapters/")]

    def add_adapters(tensors):
        for name in [name for name in tensors if name.endswith((".L", ".R"))]:
            del tensors[name]
        tensors |= {name.removeprefix("adapters/"): release.golden[name] for name in names}

    source = release.checkpoint("adapters", add_adapters)
    import_released(source, release.base, tmp_path / "ours", clip_index="last", lora_alpha=alpha)
    release.check(case, tmp_path / "ours")


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
    reasons = "one side of 0 .*; the timestep chooses .*; clips keep more than 0.95.*: proj_out"
    with pytest.raises(UserError, match=reasons):
        export_released(ours, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()
    export_released(ours, tmp_path / "theirs", approximate=True)
    assert is_released(Tensors(tmp_path / "theirs"))


def test_what_the_released_code_cannot_run_is_refused(release, imported, tmp_path):
    bits = {"proj_out": {"weights": 4, "activations": 8}}
    ours = as_trained_by_us(imported, tmp_path / "ours", bits_by_layer=bits)
    with pytest.raises(UserError, match="layers have bits of their own: proj_out"):
        export_released(ours, tmp_path / "theirs", approximate=True)
    moment = {"released_step": 2, "phase_steps": PHASE}
    import_released(release.source, release.base, tmp_path / "branch", **moment)
    with pytest.raises(UserError, match="low-rank branch"):
        export_released(tmp_path / "branch", tmp_path / "theirs", approximate=True)
    with pytest.raises(UserError, match="is in full precision"):
        export_released(release.base, tmp_path / "theirs")


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


def test_another_base_is_refused(release, tmp_path):
    source = release.checkpoint("other", lambda tensors: None)
    write_json(source / "config.json", WAN | {"num_layers": 3})
    with pytest.raises(UserError, match="describe different models"):
        import_released(source, release.base, tmp_path / "ours")
