"""Every config is whole, and the published recipes are the published ones."""

import importlib
from pathlib import Path

import pytest

from configs._recipes import RECIPES
from qvgen_jax.errors import UserError
from qvgen_jax.models.published import transformer_config
from qvgen_jax.training.check import check_config
from qvgen_jax.training.loop import rank_decay
from qvgen_jax.training.run import train
from qvgen_jax.training.student import quant_config

NAMES = sorted(
    path.stem for path in Path(__file__).parents[1].joinpath("configs").glob("*_w?a?.py")
)


def config(name: str, argument: str = "") -> dict:
    return importlib.import_module(f"configs.{name}").get_config(argument).to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_passes_its_checks_and_its_bits_are_in_its_name(name):
    for argument in ("", *["full", "full,released"] * name.startswith("tiny")):
        values = config(name, argument)
        check_config(values)
        quant = values["quant"]
        assert name.endswith(f"w{quant['weight_bits']}a{quant['act_bits']}")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_model_takes_every_recipe_and_keeps_its_own_data_steps_and_bits(name, recipe):
    own, values = config(name), config(name, recipe)
    check_config(values)
    for section, key in (("train", "steps"), ("train", "batch_size"), ("quant", "weight_bits")):
        assert values[section][key] == own[section][key]
    assert values["data"] == own["data"]
    assert values["method"] != own["method"] == "QVGen"
    model = transformer_config(values["model"])
    quant = quant_config(values["quant"], model)
    assert quant.merged == (recipe == "efficient_dm")
    assert quant.rank == (32 if recipe in ("efficient_dm", "released") else 0)
    assert quant.learned_steps == (recipe not in ("plain_qat", "released"))
    ours, theirs = (each["quant"] for each in (own, values))
    assert (ours["smoothing"], ours["rotation"]) == (0.5, "hadamard")
    assert (theirs["smoothing"], theirs["rotation"]) == (0.0, "none")


def test_an_adapters_rate_is_the_published_one_where_weights_train_at_the_usual_rate():
    rates = config("wan14b_w4a4", "efficient_dm")["train"]["learning_rate"]
    assert rates == {"weights": 3e-5, "branch": 1 / 2500, "scales": 1e-6, "clips": 5e-4}
    tiny = config("tiny_w4a4", "efficient_dm")["train"]["learning_rate"]
    assert tiny["branch"] == pytest.approx(1 / 75)  # Its weights train at 1e-3.
    variants = importlib.import_module("configs.study_tiny").get_config("finals").variants
    assert variants["efficient_dm"]["train.learning_rate.branch"] == tiny["branch"]


def test_two_recipes_at_once_are_refused():
    assert config("tiny_w3a3", "full,lsq")["train"]["steps"] == 3000
    for name, argument in (("tiny_w4a4", "lsq,q_dm"), ("wan1_3b_w4a4", "released,lsq")):
        with pytest.raises(ValueError, match="released, plain_qat, lsq, q_dm, efficient_dm"):
            config(name, argument)


@pytest.mark.parametrize(
    ("name", "steps", "phase"), [("wan1_3b_w4a4", 2667, 444), ("cogvideox2b_w4a4", 2000, 333)]
)
def test_the_released_recipe_has_the_published_phase_length(name, steps, phase):
    values = config(name, "released")
    assert values["train"]["steps"] == steps
    assert rank_decay(values).phase_steps == phase
    assert values["quant"]["behaviour"] == "released"


def test_more_steps_without_guidance_than_the_pipeline_takes_are_refused_before_training(tmp_path):
    values = config("tiny_w4a4")
    values["sample"]["unguided_steps"] = 26
    with pytest.raises(UserError, match=r"sample.unguided_steps=26; expected .* from 0 to 25"):
        train(values, tmp_path)
    assert not list(tmp_path.iterdir())
