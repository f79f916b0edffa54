"""A run of each baseline: it resumes exactly, and its export is the student that was trained."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs._recipes import RECIPES
from convert.export import export_pipeline
from qvgen_jax.quant.low_rank import merge_adapters
from qvgen_jax.quant.schedule import gate_at
from qvgen_jax.training import loop
from qvgen_jax.training.optimizer import labels
from qvgen_jax.training.student import quant_config, student_definition
from qvgen_jax.transformer import Transformer
from tests.convert.test_export import pipeline_folder
from tests.training.resuming import assert_predicts_the_same, whole_and_resumed
from tests.training.test_run import CONFIG, MODEL, SCHEDULER, Clips, teacher  # noqa: F401

STEPS = 3
# The last has learned steps with zero points, as the second, and an adapter beside.
TRAINED = (
    pytest.param("lsq", marks=pytest.mark.by_hand),
    pytest.param("q_dm", marks=pytest.mark.by_hand),
    pytest.param("efficient_dm", marks=pytest.mark.slow),
)


def config(name: str) -> dict:
    sections = {key: dict(CONFIG[key]) for key in ("quant", "train")}
    sections["train"] |= {"learning_rate": dict(CONFIG["train"]["learning_rate"])}
    sections["train"] |= {"steps": STEPS, "truth_blend": 0.0, "ema_decay": 0.0}
    for key, value in RECIPES[name].items():
        *path, leaf = key.split(".")
        if path:
            node = sections[path[0]]
            (node[path[1]] if path[1:] else node)[leaf] = value
    if sections["quant"]["rank"]:
        sections["quant"]["rank"] = 2
    return {**CONFIG, **sections}


@pytest.mark.parametrize("name", TRAINED)
def test_a_baseline_resumes_exactly_and_is_exported_as_trained(
    name,
    teacher,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    values = config(name)
    merged = name == "efficient_dm"
    whole, resumed = whole_and_resumed(values, teacher, tmp_path, monkeypatch, at=2, branch=merged)
    learned_what_it_should(values, whole, teacher)

    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    exported_as_trained(values, whole, tmp_path)


def learned_what_it_should(values: Mapping, state: dict, teacher: dict) -> None:  # noqa: F811
    frozen = values["train"]["freeze_weights"]
    groups, moved = labels(state["params"]), {}
    first = loop.undrawn_state(values, MODEL, teacher)["params"]

    def compare(path: tuple, group: str, before: jax.Array, after: jax.Array) -> None:
        name = (group, path[-1].key)
        moved[name] = moved.get(name, False) or not np.array_equal(before, after)

    jax.tree_util.tree_map_with_path(compare, groups, first, state["params"])
    assert moved["weights", "kernel"] != frozen
    assert moved["clips", "act_scale"]
    assert ("clips", "act_zero_point") in moved or values["quant"]["act_range"] == "learned"
    buckets = values["quant"]["buckets"]
    assert state["params"]["blocks"]["attn1"]["to_q"]["act_scale"].shape == (2, buckets)
    assert float(state["params"]["blocks"]["attn1"]["to_q"]["act_scale"].min()) > 0
    if frozen:
        assert moved["branch", "L"]
        assert not any(changed for (group, _), changed in moved.items() if group == "weights")
        moments = jax.tree_util.tree_leaves_with_path(state["opt"])
        assert moments
        assert not [path for path, _ in moments if "kernel" in str(path)]


def exported_as_trained(values: Mapping, state: dict, tmp_path: Path) -> None:
    quant, params = quant_config(values["quant"], MODEL), state["params"]
    definition = student_definition(MODEL, quant, jnp.float32, branch=quant.merged)
    gate = gate_at(STEPS - 1, loop.rank_decay(values)) if quant.merged else None
    trained = Transformer(MODEL, definition, (params, state["levels"]), gate)
    source = pipeline_folder(tmp_path / "source", MODEL)
    export_pipeline(source, tmp_path / "export", MODEL, params, quant, levels=state["levels"])
    assert_predicts_the_same(tmp_path / "export", trained)
    if quant.merged:  # The export is that of the merged weight: nothing is left of the adapter.
        folder = tmp_path / "merged"
        plain = merge_adapters(params)
        export_pipeline(source, folder, MODEL, plain, quant, levels=state["levels"])
        weights = "transformer/diffusion_pytorch_model.safetensors"
        assert (folder / weights).read_bytes() == (tmp_path / "export" / weights).read_bytes()
