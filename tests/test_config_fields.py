"""A value of another kind or out of range in a config file is refused by its field's name.

Real files pass.
"""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest

from convert.load import read_components
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.config_fields import Even, Positive, Range, check_fields
from qvgen_jax.diffusion.schedulers import make_schedule, scheduler_from_json
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json
from qvgen_jax.text.t5 import T5Config, relative_position_buckets

ASSET = Path(__file__).parents[1] / "assets/tiny_wan"
PUBLISHED = Path(__file__).parent / "models/configs"


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


READERS = {
    "wan": (config_from_json, _read(PUBLISHED / "Wan2.1-T2V-1.3B.json")),
    "cogvideox": (config_from_json, _read(PUBLISHED / "CogVideoX1.5-5B.json")),
    "cogvideox 5b": (config_from_json, _read(PUBLISHED / "CogVideoX-5B.json")),
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
        ("unipc", "num_train_timesteps", "zz", "a whole number from 2"),
        ("unipc", "solver_order", True, "a whole number from 1"),
        ("unipc", "disable_corrector", 3, "each a whole number from 0"),
        ("unipc", "_class_name", ["x"], "UniPCMultistepScheduler"),
        ("euler", "shift", "zz", "a number"),
        ("euler", "num_train_timesteps", "zz", "a whole number from 2"),
        ("ddim", "beta_start", "zz", "a number"),
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


OUT_OF_RANGE = [
    ("wan", "eps", 0, "a number above 0"),
    ("wan", "eps", -1e-6, "a number above 0"),
    ("wan", "num_attention_heads", -12, "a whole number from 1"),
    ("wan", "patch_size", [1, -2, 2], "a list of 3 values, each a whole number from 1"),
    ("wan", "attention_head_dim", 127, "a whole number from 2 and even"),
    ("wan", "freq_dim", 255, "a whole number from 2 and even"),
    ("cogvideox", "norm_eps", 0.0, "a number above 0"),
    ("cogvideox", "norm_eps", -1e-5, "a number above 0"),
    ("cogvideox", "num_layers", 0, "a whole number from 1"),
    ("cogvideox", "num_attention_heads", -48, "a whole number from 1"),
    ("cogvideox", "patch_size", 0, "a whole number from 1"),
    ("cogvideox", "patch_size_t", 0, "a whole number from 1 or null"),
    ("cogvideox", "spatial_interpolation_scale", 0, "a number above 0"),
    ("cogvideox", "temporal_interpolation_scale", -1.0, "a number above 0"),
    ("cogvideox 5b", "sample_height", 1, "at least patch_size = 2"),
    ("cogvideox 5b", "sample_width", 1, "at least patch_size = 2"),
    ("wan vae", "latents_std", [1.0, 0.0], "a list, each a number above 0"),
    ("wan vae", "latents_std", [1.0, -2.0], "a list, each a number above 0"),
    ("wan vae", "latents_std", [1.0, float("nan")], "a list, each a number above 0"),
    ("wan vae", "latents_mean", [0.0, float("inf")], "a list, each a number"),
    ("wan vae", "latents_mean", [0.0], "as many values as z_dim = 16"),
    ("wan vae", "latents_std", [1.0] * 9, "as many values as z_dim = 16"),
    ("wan vae", "temperal_downsample", [], "one value fewer than the 4 of dim_mult"),
    ("wan vae", "num_res_blocks", 0, "a whole number from 1"),
    ("cogvideox vae", "scaling_factor", 0, "a number above 0"),
    ("cogvideox vae", "scaling_factor", -0.7, "a number above 0"),
    ("cogvideox vae", "norm_eps", 0.0, "a number above 0"),
    ("cogvideox vae", "layers_per_block", -3, "a whole number from 1"),
    ("cogvideox vae", "block_out_channels", [], "one number of channels or more"),
    ("text", "layer_norm_epsilon", 0, "a number above 0"),
    ("text", "layer_norm_epsilon", -1e-6, "a number above 0"),
    ("text", "num_layers", 0, "a whole number from 1"),
    ("text", "num_heads", -4, "a whole number from 1"),
    ("text", "relative_attention_num_buckets", 1, "a whole number from 4"),
    ("text", "relative_attention_num_buckets", 3, "a whole number from 4"),
    ("text", "relative_attention_max_distance", 1, "more than 8, a quarter of"),
    ("text", "relative_attention_max_distance", 8, "more than 8, a quarter of"),
    ("unipc", "flow_shift", 0, "a number above 0"),
    ("unipc", "flow_shift", -3.0, "a number above 0"),
    ("unipc", "num_train_timesteps", -1000, "a whole number from 2"),
    ("unipc", "num_train_timesteps", 1, "a whole number from 2"),
    ("unipc", "disable_corrector", [0, -1], "a list, each a whole number from 0"),
    ("euler", "shift", 0.0, "a number above 0"),
    ("euler", "shift", -1, "a number above 0"),
    ("euler", "num_train_timesteps", 0, "a whole number from 2"),
    ("ddim", "beta_start", -0.00085, "a number above 0 and below 1"),
    ("ddim", "beta_start", 0, "a number above 0 and below 1"),
    ("ddim", "beta_start", 0.013, "at most beta_end = 0.012"),
    ("ddim", "beta_end", 1.0, "a number above 0 and below 1"),
    ("ddim", "snr_shift_scale", 0, "a number above 0"),
    ("ddim", "num_train_timesteps", 0, "a whole number from 2"),
    ("ddim", "num_train_timesteps", 1, "a whole number from 2"),
]
FILES = {
    "wan": "the transformer's config.json",
    "cogvideox": "the transformer's config.json",
    "cogvideox 5b": "the transformer's config.json",
    "wan vae": "the VAE's config.json",
    "cogvideox vae": "the VAE's config.json",
    "text": "the text encoder's config.json",
    "unipc": "scheduler_config.json",
    "euler": "scheduler_config.json",
    "ddim": "scheduler_config.json",
}
REMEDY = "; correct it there, or fetch the file again"


@pytest.mark.parametrize(("kind", "field", "value", "expected"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_on_reading(kind, field, value, expected):
    read, fields = READERS[kind]
    with pytest.raises(UserError) as caught:
        read({**fields, field: value})
    message = str(caught.value)
    assert message.startswith(f"{field} is {value!r} in {FILES[kind]}, expected {expected}")
    assert message.endswith(REMEDY)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("text", {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 2}),
        ("text", {"relative_attention_max_distance": 9}),
        ("ddim", {"beta_start": 0.012}),
        ("ddim", {"num_train_timesteps": 2}),
        ("unipc", {"num_train_timesteps": 2, "disable_corrector": [0]}),
        ("euler", {"shift": 1}),
        ("wan", {"eps": 1e-12, "attention_head_dim": 2}),
        ("cogvideox 5b", {"sample_height": 2}),
    ],
)
def test_the_ends_of_a_range_are_read(kind, changes):
    read, fields = READERS[kind]
    read({**fields, **changes})


@pytest.mark.parametrize("kind", ["unipc", "euler", "ddim"])
def test_the_smallest_noise_process_that_is_read_has_a_finite_schedule(kind):
    read, fields = READERS[kind]
    process = {"num_train_timesteps": 2, "rescale_betas_zero_snr": True}
    schedule = make_schedule(read({**fields, **process}), 2)
    assert all(np.isfinite(rows).all() for rows in schedule)


def test_the_fewest_buckets_that_are_read_take_every_distance():
    fields = {"relative_attention_num_buckets": 4, "relative_attention_max_distance": 2}
    config = T5Config.from_json(fields)
    with np.errstate(all="raise"):
        buckets = relative_position_buckets(
            50, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
    assert set(buckets.flat) == {0, 1, 3}  # 2 is "after", at distance 0


@dataclasses.dataclass(frozen=True)
class _Config:
    count: int = 1
    ratio: float = 0.5
    name: str = "x"
    pauses: tuple[Annotated[int, Range(least=0)], ...] = ()
    share: Annotated[float, Range(above=0, below=1)] = 0.5
    channels: Even | None = None
    spread: tuple[Positive, ...] = (1.0,)


@pytest.mark.parametrize(
    "config",
    [
        _Config(),
        _Config(ratio=2),
        _Config(ratio=-1.0),
        _Config(pauses=(0, 3)),
        _Config(share=1e-9),
        _Config(channels=2),
        _Config(spread=(1, 5e-324)),
    ],
)
def test_whole_numbers_are_numbers_and_ranges_hold_what_they_say(config):
    check_fields(config, "a file")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (_Config(count=0), "^count is 0 in a file, expected a whole number from 1;"),
        (_Config(ratio=True), "^size is True in a file, expected a number;"),
        (_Config(ratio=float("-inf")), "^size is -inf in a file, expected a number;"),
        (_Config(name=3), "^name is 3 in a file, expected a string;"),
        (_Config(pauses=(-1,)), r"^pauses is \[-1\] in a file, expected .* number from 0;"),
        (_Config(share=0), "^share is 0 in a file, expected a number above 0 and below 1;"),
        (_Config(share=1), "^share is 1 in a file, expected a number above 0 and below 1;"),
        (_Config(channels=3), "^channels is 3 in a file, .* number from 2 and even or null;"),
        (_Config(channels=0), "^channels is 0 in a file, .* number from 2 and even or null;"),
        (_Config(spread=(1, 0)), r"^spread is \[1, 0\] in a file, .* each a number above 0;"),
    ],
)
def test_the_message_says_field_value_file_and_expectation(config, message):
    with pytest.raises(UserError, match=f"{message} correct it there, or fetch the file again$"):
        check_fields(config, "a file", names={"ratio": "size"})


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("height", "zz", "a whole number from 1"),
        ("num_frames", 0, "a whole number from 1"),
        ("steps", 2.5, "a whole number from 1"),
        ("max_length", None, "a whole number from 1"),
        ("num_frames", -1, "a whole number from 1"),
        ("height", 0, "a whole number from 1"),
        ("width", -16, "a whole number from 1"),
        ("steps", 0, "a whole number from 1"),
        ("max_length", 0, "a whole number from 1"),
        ("guidance_scale", "3", "a number from 0"),
        ("guidance_scale", -1, "a number from 0"),
        ("fps", [8], "a number above 0"),
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
    assert str(caught.value) == f"{field} is {value!r} in {path}, expected {expected}{REMEDY}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_dim", 10**4000),
        ("base_dim", 2**31),
        ("num_res_blocks", 10**9),
        ("dim_mult", [1] * 13),
        ("dim_mult", [1] * 10**6),
    ],
)
def test_a_size_that_would_take_for_ever_to_build_is_refused_at_once(field, value):
    with pytest.raises(UserError, match=f"{field} is ") as told:
        WanVAEConfig.from_json({field: value})
    assert len(str(told.value)) < 1000


@pytest.mark.parametrize("read", [config_from_json, T5Config.from_json])
def test_more_layers_than_there_are_names_for_are_refused_at_once(read):
    with pytest.raises(UserError, match="num_layers is 2147483647 in"):
        read({"num_layers": 2**31 - 1})


@pytest.mark.parametrize(
    ("field", "value"),
    [("flow_shift", 1e308), ("solver_order", 2**30), ("num_train_timesteps", 2**30)],
)
def test_a_scheduler_whose_numbers_no_schedule_holds_is_refused(field, value):
    fields = json.loads(Path("assets/tiny_wan/scheduler/scheduler_config.json").read_text())
    with pytest.raises(UserError, match=f"{field} is "):
        scheduler_from_json(fields | {field: value})
