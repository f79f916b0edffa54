"""A value of another kind in a config file is refused by its field's name, and real files pass."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from convert.load import read_components
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.config_fields import check_fields
from qvgen_jax.diffusion.schedulers import scheduler_from_json
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json
from qvgen_jax.text.t5 import T5Config

ASSET = Path(__file__).parents[1] / "assets/tiny_wan"
PUBLISHED = Path(__file__).parent / "models/configs"


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


READERS = {
    "wan": (config_from_json, _read(PUBLISHED / "Wan2.1-T2V-1.3B.json")),
    "cogvideox": (config_from_json, _read(PUBLISHED / "CogVideoX1.5-5B.json")),
    "wan vae": (WanVAEConfig.from_json, _read(ASSET / "vae/config.json")),
    "cogvideox vae": (CogVideoXVAEConfig.from_json, {}),
    "text": (T5Config.from_json, _read(ASSET / "text_encoder/config.json")),
    "unipc": (scheduler_from_json, _read(ASSET / "scheduler/scheduler_config.json")),
    "euler": (scheduler_from_json, {"_class_name": "FlowMatchEulerDiscreteScheduler"}),
    "ddim": (
        scheduler_from_json,
        {
            "_class_name": "CogVideoXDDIMScheduler",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ),
}


@pytest.mark.parametrize("kind", READERS)
def test_the_values_of_real_files_pass(kind):
    read, fields = READERS[kind]
    read(fields)


@pytest.mark.parametrize(
    ("kind", "field", "value", "expected"),
    [
        ("wan", "num_layers", "6", "a whole number from 1"),
        ("wan", "num_layers", -1, "a whole number from 1"),
        ("wan", "num_layers", True, "a whole number from 1"),
        ("wan", "num_layers", None, "a whole number from 1"),
        ("wan", "num_attention_heads", 0, "a whole number from 1"),
        ("wan", "ffn_dim", 1.5, "a whole number from 1"),
        ("wan", "in_channels", "16", "a whole number from 1"),
        ("wan", "out_channels", 0, "a whole number from 1"),
        ("wan", "patch_size", 2, "a list of 3 values, each a whole number from 1"),
        ("wan", "patch_size", [1, 2], "a list of 3 values, each a whole number from 1"),
        ("wan", "patch_size", [1, 2, 0], "a list of 3 values, each a whole number from 1"),
        ("wan", "eps", "x", "a number"),
        ("wan", "eps", float("nan"), "a number"),
        ("wan", "eps", 10**400, "a number"),
        ("wan", "_class_name", ["x"], "WanTransformer3DModel"),
        ("cogvideox", "num_layers", "6", "a whole number from 1"),
        ("cogvideox", "attention_head_dim", [64], "a whole number from 1"),
        ("cogvideox", "patch_size", [2, 2], "a whole number from 1"),
        ("cogvideox", "patch_size_t", "2", "a whole number from 1 or null"),
        ("cogvideox", "patch_bias", "no", "true or false"),
        ("cogvideox", "use_rotary_positional_embeddings", 1, "true or false"),
        ("cogvideox", "_class_name", {"a": 1}, "CogVideoXTransformer3DModel"),
        ("wan vae", "base_dim", "16", "a whole number from 1"),
        ("wan vae", "decoder_base_dim", "16", "a whole number from 1 or null"),
        ("wan vae", "num_res_blocks", "1", "a whole number from 1"),
        ("wan vae", "in_channels", "3", "a whole number from 1"),
        ("wan vae", "dim_mult", 4, "a list, each a whole number from 1"),
        ("wan vae", "temperal_downsample", [0, 1, 1], "each true or false"),
        ("wan vae", "latents_mean", ["x"] * 16, "each a number"),
        ("wan vae", "latents_std", None, "each a number"),
        ("wan vae", "_class_name", ["x"], "AutoencoderKLWan"),
        ("cogvideox vae", "layers_per_block", "3", "a whole number from 1"),
        ("cogvideox vae", "norm_num_groups", 0, "a whole number from 1"),
        ("cogvideox vae", "block_out_channels", "128", "each a whole number from 1"),
        ("cogvideox vae", "scaling_factor", "x", "a number"),
        ("cogvideox vae", "down_block_types", 5, "CogVideoXDownBlock3D"),
        ("text", "d_ff", "128", "a whole number from 1"),
        ("text", "d_kv", "16", "a whole number from 1"),
        ("text", "num_heads", "4", "a whole number from 1"),
        ("text", "layer_norm_epsilon", "zz", "a number"),
        ("text", "relative_attention_max_distance", "zz", "a whole number from 1"),
        ("text", "model_type", ["umt5"], "'umt5'"),
        ("unipc", "flow_shift", "zz", "a number"),
        ("unipc", "flow_shift", None, "a number"),
        ("unipc", "num_train_timesteps", "zz", "a whole number from 1"),
        ("unipc", "solver_order", True, "a whole number from 1"),
        ("unipc", "disable_corrector", 3, "each a whole number from 0"),
        ("unipc", "_class_name", ["x"], "UniPCMultistepScheduler"),
        ("euler", "shift", "zz", "a number"),
        ("euler", "num_train_timesteps", "zz", "a whole number from 1"),
        ("ddim", "beta_start", "zz", "a number"),
        ("ddim", "num_train_timesteps", 0, "a whole number from 1"),
        ("ddim", "set_alpha_to_one", "yes", "true or false"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(kind, field, value, expected):
    read, fields = READERS[kind]
    with pytest.raises(UserError) as caught:
        read({**fields, field: value})
    message = str(caught.value)
    assert expected in message
    # A transformer's other class is named as what the file is of, not as a field.
    assert field in message or field == "_class_name"
    assert (repr(value) if field != "_class_name" else str(value)) in message


@dataclasses.dataclass(frozen=True)
class _Config:
    count: int = 1
    ratio: float = 0.5
    name: str = "x"
    pauses: tuple[int, ...] = ()


@pytest.mark.parametrize(
    "config", [_Config(), _Config(ratio=2), _Config(ratio=-1.0), _Config(pauses=(0, 3))]
)
def test_whole_numbers_are_numbers_and_listed_fields_may_be_zero(config):
    check_fields(config, "a file", may_be_zero=("pauses",))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_Config(count=0), "^count is 0 in a file, expected a whole number from 1$"),
        (_Config(ratio=True), "^size is True in a file, expected a number$"),
        (_Config(ratio=float("-inf")), "^size is -inf in a file, expected a number$"),
        (_Config(name=3), "^name is 3 in a file, expected a string$"),
        (_Config(pauses=(-1,)), r"^pauses is \[-1\] in a file, expected .* number from 0$"),
    ],
)
def test_the_message_says_field_value_file_and_expectation(config, message):
    with pytest.raises(UserError, match=message):
        check_fields(config, "a file", may_be_zero=("pauses",), names={"ratio": "size"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("height", "zz", "a whole number from 1"),
        ("num_frames", 0, "a whole number from 1"),
        ("steps", 2.5, "a whole number from 1"),
        ("max_length", None, "a whole number from 1"),
        ("guidance_scale", "3", "a number"),
        ("fps", [8], "a number"),
        ("fps", 0, "a number above 0"),
    ],
)
def test_a_generation_config_is_refused_on_reading(tmp_path, field, value, expected):
    folder = tmp_path / "tiny_wan"
    shutil.copytree(ASSET, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(_read(path) | {field: value}))
    with pytest.raises(UserError) as caught:
        read_components(folder, "float32")
    assert str(caught.value) == f"{field} is {value!r} in {path}, expected {expected}"
