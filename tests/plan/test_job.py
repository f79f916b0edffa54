"""`--job plan` from a config to text and JSON, this machine's compiler included."""

import json

import pytest

from configs import read_config
from qvgen_jax.plan.job import run_plan


def tiny(**train):
    config = read_config("configs/tiny_w4a4.py").to_dict()
    config["train"] |= train
    return config


def test_the_file_says_what_the_text_says(tmp_path):
    file = tmp_path / "plan.json"
    text = run_plan(tiny(), "h100:8", compiler=False, file=str(file))
    found = json.loads(file.read_text())
    assert found["target"] == "h100:8"
    assert found["devices"] == 8
    assert found["compiled"] is None
    assert found["fits"] is True
    assert f"Verdict: {found['verdict']}" in text
    assert f"{found['memory']['peak'] / 1e9:.3f}" in text
    assert f"operations of a step: {found['operations']:.3e}" in text
    assert sum(found["work"].values()) == found["operations"]


@pytest.mark.slow
def test_on_this_machine_its_own_compiler_is_asked():
    text = run_plan(tiny(batch_size=2))
    assert "compiler: all laid out" in text
    assert "time: unknown, cpu has no peak in a data sheet" in text
    assert "cpu has no size in a data sheet to compare with" in text
