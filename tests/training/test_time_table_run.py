"""A run with a time table on the tiny pipeline: its linears learn, and the export generates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.tiny_w4a4 import get_config
from convert.export import export_pipeline
from qvgen_jax import load
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.finish import measure_sizes
from qvgen_jax.evaluation.report.sizes import size_section
from qvgen_jax.models import quantizable, time_only
from qvgen_jax.training import loop
from qvgen_jax.training.check import check_config
from qvgen_jax.training.checkpoint import claim_workdir, compare_workdir
from qvgen_jax.training.student import describe_layers, quant_config, student_definition

pytestmark = pytest.mark.slow

SMALL = {"num_frames": 5, "height": 32, "width": 32, "seeds": 3}
PROMPT = "a red star moving up"


def config(**quant) -> dict:
    config = get_config().to_dict()
    # 8 bits: at 4, any last bit of the input moves the latents by a third.
    bits = {"weight_bits": 8, "act_bits": 8}
    config["quant"] |= {"rank": 0, "time_table": True, **bits, **quant}
    config["train"] |= {"steps": 6, "batch_size": 2, "warmup_steps": 1, "checkpoint_every": 6}
    return config


class Clips:
    """Four clips of two latent frames, as `EncodedDataset` gives them."""

    max_length = 5

    def __init__(self, channels: int, text_dim: int):
        self.shape, self.text = (2, 4, 4, channels), (5, text_dim)
        self.empty_text_embeds = np.zeros(self.text, np.float32)
        self.buckets = {"of one size": range(4)}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(index))
        return {
            "latent_mean": rng.normal(size=self.shape).astype(np.float32),
            "latent_logvar": np.full(self.shape, -4.0, np.float32),
            "text_embeds": rng.normal(size=self.text).astype(np.float32),
            "caption": "a clip",
        }


def _at(tree: dict, name: str) -> dict:
    for part in name.split("."):
        tree = tree[part]
    return tree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The teacher's pipeline, the trained state, and the export's folder."""
    folder, values = tmp_path_factory.mktemp("run"), config()
    teacher = load(values["model"])
    model, params = teacher.transformer.config, teacher.transformer.states[0]
    clips = Clips(model.in_channels, model.text_dim)
    state, _ = loop.run_steps(values, folder, model, teacher.scheduler, params, clips)
    quant = quant_config(values["quant"], model)
    export_pipeline(
        values["model"], folder / "export", model, state["params"], quant, levels=state["levels"]
    )
    return teacher, state, folder / "export"


def test_the_timestep_linears_train_in_float_and_the_rest_is_quantized(run):
    teacher, state, _ = run
    before, after = teacher.transformer.states[0], state["params"]
    names = time_only(teacher.transformer.config)
    for name in names:
        assert set(_at(after, name)) == {"kernel", "bias"}
        assert np.abs(_at(after, name)["kernel"] - _at(before, name)["kernel"]).max() > 1e-4
    assert "scale" in _at(after, "blocks.attn1.to_q")
    lines = describe_layers(
        teacher.transformer.config, quant_config(config()["quant"], teacher.transformer.config)
    )
    assert lines.count("full precision, a table in the export") == len(names)


def test_the_export_generates_what_was_trained(run):
    teacher, state, export = run
    quant = quant_config(config()["quant"], teacher.transformer.config)
    definition = student_definition(teacher.transformer.config, quant, jnp.float32, branch=False)
    trained = teacher.with_transformer(definition, state["params"], state["levels"])
    exported = load(export)
    assert exported.transformer.table_steps == (teacher.defaults["steps"],) == (25,)
    there = trained.sample_latents(PROMPT, **SMALL)
    here = exported.sample_latents(PROMPT, **SMALL)
    # float16 moves the modulation by 2^-11 of itself, and some codes then fall the other way.
    assert np.linalg.norm(here - there) < 0.1 * np.linalg.norm(there)
    frames = exported.generate(PROMPT, **SMALL)
    assert frames.shape == (1, 5, 32, 32, 3)
    assert frames.std() > 0


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"steps": 20}, r"export again with .*table_steps=\(20,\)"),
        ({"flow_shift": 5.0}, "leave flow"),
    ],
)
def test_other_timesteps_are_refused_before_the_prompt_is_encoded(
    run, changes, remedy, monkeypatch
):
    exported = load(run[2])

    def encode(*arguments):
        raise AssertionError("the prompt was encoded")

    monkeypatch.setattr(type(exported), "encode_prompt", encode)
    with pytest.raises(UserError, match=f"made for steps = 25 .*{remedy}"):
        exported.sample_latents(PROMPT, **SMALL, **changes)


def test_the_sizes_know_the_table(run):
    teacher, _, export = run
    sizes = measure_sizes(teacher, export)
    model, params = teacher.transformer.config, teacher.transformer.states[0]
    quantized = [name for name in quantizable(model) if name not in time_only(model)]
    assert sizes["linears_bf16_bytes"] == 2 * sum(
        _at(params, name)["kernel"].size for name in quantized
    )
    replaced = sum(
        leaf.size for name in time_only(model) for leaf in jax.tree.leaves(_at(params, name))
    )
    (row,) = sizes["rows"]
    assert row["bf16_bytes"] == 2 * replaced
    assert row["export_bytes"] == 2 * 25 * 7 * model.dim + 4 * 25
    assert row["name"] in size_section(sizes)


def test_table_steps_are_checked_and_may_change_after_training(tmp_path):
    check_config(config(table_steps=(20, 30)))
    with pytest.raises(UserError, match="expected numbers of steps from 1 to 1000"):
        check_config(config(table_steps=(0,)))
    with pytest.raises(UserError, match=r"add --config.quant\.time_table=True"):
        check_config(config(table_steps=(20,), time_table=False))
    claim_workdir(tmp_path, config())
    compare_workdir(tmp_path, config(table_steps=(20,)))
