"""Real `config.json` files: the published number of parameters, and what is refused."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.models import abstract_params, config_from_json

CONFIGS = Path(__file__).parent / "configs"


@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("CogVideoX-2B", 1_693_783_872),
        ("CogVideoX-5B", 5_570_283_072),
        ("CogVideoX1.5-5B", 5_570_676_352),
        ("Wan2.1-T2V-1.3B", 1_418_996_800),
        ("Wan2.1-T2V-14B", 14_288_491_584),
    ],
)
def test_real_models_have_the_published_number_of_parameters(model, count):
    leaves = jax.tree.leaves(abstract_params(CONFIGS / f"{model}.json"))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert sum(leaf.size for leaf in leaves) == count


def test_a_config_its_fields_and_its_file_describe_the_same_parameters():
    path = CONFIGS / "CogVideoX-2B.json"
    fields = json.loads(path.read_text())
    params = abstract_params(fields)
    assert params == abstract_params(str(path)) == abstract_params(config_from_json(fields))
    kernel = params["blocks"]["attn1"]["to_q"]["kernel"]
    assert (kernel.shape, kernel.dtype) == ((30, 1920, 1920), jnp.float32)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("CogVideoX-5B-I2V", "use_learned_positional_embeddings = True"),
        ("CogVideoX1.5-5B-I2V", "ofs_embed_dim = 512"),
        ("Wan2.1-I2V-14B-480P", "image_dim = 1280"),
        ("Wan2.1-FLF2V-14B-720P", "image_dim = 1280"),
        ("Wan2.2-I2V-A14B", "in_channels = 36"),
        ("Wan2.2-TI2V-5B", "in_channels = 48"),
    ],
)
def test_relatives_are_refused_with_what_is_supported(model, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        abstract_params(CONFIGS / f"{model}.json")
    assert "text-to-video" in str(refusal.value)


def test_another_class_is_refused_with_both_that_are_supported():
    with pytest.raises(UserError, match="WanVACETransformer3DModel") as refusal:
        config_from_json({"_class_name": "WanVACETransformer3DModel"})
    assert "Wan 2.1 text-to-video" in str(refusal.value)
    assert "CogVideoX-2B" in str(refusal.value)


def test_a_file_that_is_no_config_is_refused(tmp_path):
    damaged = tmp_path / "config.json"
    damaged.write_text("{")
    for path in (damaged, tmp_path / "missing.json"):
        with pytest.raises(UserError, match="not a readable"):
            abstract_params(path)
