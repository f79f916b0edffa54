"""What is known of published models without their files, against those files."""

import json
from pathlib import Path

import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json
from qvgen_jax.models.linears import attended, linears, video_tokens
from qvgen_jax.models.published import PUBLISHED, transformer_config

CONFIGS = Path(__file__).parent / "configs"
FILES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "Wan2.1-T2V-1.3B",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "Wan2.1-T2V-14B",
    "zai-org/CogVideoX-2b": "CogVideoX-2B",
    "zai-org/CogVideoX-5b": "CogVideoX-5B",
    "zai-org/CogVideoX1.5-5B": "CogVideoX1.5-5B",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_is_what_its_config_json_says(name):
    fields = json.loads((CONFIGS / f"{FILES[name]}.json").read_text())
    assert transformer_config(name) == config_from_json(fields)


def test_a_folder_is_read_and_a_stranger_is_refused_with_what_there_is():
    assert transformer_config("assets/tiny_wan").num_layers == 6
    with pytest.raises(UserError, match=r"someone/else is no pipeline folder here.*Wan2.1-T2V-14B"):
        transformer_config("someone/else")


@pytest.mark.parametrize(
    ("name", "size", "tokens"),
    [
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (81, 480, 832), 32760),
        ("Wan-AI/Wan2.1-T2V-14B-Diffusers", (81, 720, 1280), 75600),
        ("zai-org/CogVideoX-2b", (49, 480, 720), 17550),
        # 21 latent frames fill 11 patches of two.
        ("zai-org/CogVideoX1.5-5B", (81, 768, 1360), 44880),
    ],
)
def test_a_video_has_as_many_tokens_as_the_network_sees(name, size, tokens):
    assert video_tokens(PUBLISHED[name], *size) == tokens


@pytest.mark.parametrize(
    ("name", "count"),
    [("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 306), ("zai-org/CogVideoX-2b", 245)],
)
def test_every_linear_is_there_with_its_rows(name, count):
    found = {linear.name: linear for linear in linears(PUBLISHED[name], 100, 7)}
    assert sum(linear.count for linear in found.values()) == count
    wan = name.startswith("Wan")
    assert found["blocks.attn1.to_q"].rows == (100 if wan else 107)
    text = "blocks.attn2.to_k" if wan else "patch_embed.text_proj"
    assert found[text].rows == 7
    time = "condition_embedder.time_proj" if wan else "blocks.norm1.linear"
    assert found[time].rows == 1
    assert attended(PUBLISHED[name], 100, 7) == ([(100, 100), (100, 7)] if wan else [(107, 107)])
