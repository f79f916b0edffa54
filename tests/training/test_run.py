"""Whole runs of a model of the smallest size: resumed, accumulated, compiled once."""

import json
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs.tiny_w4a4 import get_config
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig, WanTransformer
from qvgen_jax.training import loop
from qvgen_jax.training.checkpoint import claim_workdir, committed, compare_workdir
from qvgen_jax.training.optimizer import labels
from qvgen_jax.training.pace import SPEED
from qvgen_jax.training.state import exported_params
from qvgen_jax.training.step import noisy_inputs, sample_keys

MODEL = WanConfig(
    num_attention_heads=1,
    attention_head_dim=12,
    in_channels=2,
    out_channels=2,
    text_dim=8,
    freq_dim=8,
    ffn_dim=16,
    num_layers=2,
)
SCHEDULER = UniPCConfig()
# Ranks 2, 1, 0: boundaries at steps 2 and 4. With every option that adds to the state or the step.
CONFIG = {
    "seed": 3,
    "model": "tiny",
    "compute_dtype": "float32",
    "data": {"max_length": 5},
    "quant": {
        "behaviour": "default",
        "weight_bits": 4,
        "act_bits": 4,
        "act_range": "token",
        "buckets": 50,
        "rank": 2,
        "shrink": 2,
        "decay_shape": "cosine",
        "decay_fraction": 0.7,
        "branch_moments": "rotate",
        "decay_order": "smallest",
        "refactor": True,
        "branch_space": "tokens",
        "symmetric_weights": False,
        "include_zero": "",
        "rotation": "none",
        "smoothing": 0.0,
        "time_table": False,
        "clip_index": "",
        "bits": (("blocks.attn1.to_q", 8, 6),),
        "full_precision": (),
        "product_dtype": "int8",
    },
    "train": {
        "steps": 6,
        "batch_size": 4,
        "accumulate": 1,
        "warmup_steps": 1,
        "learning_rate": {"weights": 1e-3, "branch": 1e-3, "scales": 1e-3, "clips": 1e-2},
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 1e-4,
        "clip_norm": 1.0,
        "schedule": "constant_tail",
        "tail_rate": 0.0,
        "truth_blend": 5.0,
        "target": "teacher",
        "freeze_weights": False,
        "scale_aware": False,
        "teacher_weights": "float",
        "ema_decay": 0.9,
        "shift": 1.0,
        "caption_dropout": 0.5,
        "remat": "blocks",
        "log_every": 1,
        "log_spectrum": True,
        "checkpoint_every": 1,
        "keep_checkpoints": 2,
        "profile_steps": 0,
        "hang_minutes": 0.0,
        "most_skipped": 3,
        "fresh_orders": 1,
        "validate_every": 0,
        "validate_videos": 0,
        "export_best": False,
        "wandb_project": "",
    },
}


class Clips:
    """Five clips in memory, as `EncodedDataset` gives them."""

    max_length = 5
    empty_text_embeds = np.zeros((5, 8), np.float32)
    buckets = MappingProxyType({"of one size": range(5)})

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(index))
        return {
            "latent_mean": rng.normal(size=(2, 2, 4, 2)).astype(np.float32),
            "latent_logvar": np.full((2, 2, 4, 2), -2.0, np.float32),
            "text_embeds": rng.normal(size=(3, 8)).astype(np.float32),
            "caption": "a clip",
        }


@pytest.fixture(scope="module")
def teacher() -> dict:
    rng = np.random.default_rng(0)
    model = nnx.eval_shape(lambda: WanTransformer(MODEL, key=jax.random.key(0)))
    shapes = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)


_COMPILED, _WHOLE = {}, {}
# Keys that the loop reads and the step does not.
OF_THE_LOOP = ("checkpoint_every", "keep_checkpoints", "most_skipped", "fresh_orders")
OF_THE_LOOP += ("validate_every", "validate_videos", "export_best")


@pytest.fixture(autouse=True)
def shared_compilation(monkeypatch):
    """Compiling takes most of the time; every run here has the same two programs."""
    compile_step = loop.compile_step

    def cached(recipe, places=None):
        assert places is None  # One device.
        train = {key: value for key, value in recipe.train.items() if key not in OF_THE_LOOP}
        key = recipe.student, json.dumps(train)
        if key not in _COMPILED:
            _COMPILED[key] = compile_step(recipe)
        return _COMPILED[key]

    monkeypatch.setattr(loop, "compile_step", cached)


def lines(workdir) -> list[dict]:
    """`metrics.jsonl` without what may differ: the speed."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in SPEED} for r in records]


@pytest.fixture
def uninterrupted(teacher, tmp_path_factory):
    if "run" not in _WHOLE:
        workdir = tmp_path_factory.mktemp("whole")
        state, _ = loop.run_steps(CONFIG, workdir, MODEL, SCHEDULER, teacher, Clips())
        _WHOLE["run"] = state, lines(workdir)
        _WHOLE["programs"] = [step._cache_size() for step in _COMPILED.values()]
    return _WHOLE["run"]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("step", [2, 3, 5])
def test_a_run_stopped_at_any_step_ends_bit_equal(
    step, uninterrupted, teacher, tmp_path, monkeypatch
):
    """Exactly at the refactoring (2), within a phase, and after the drop to rank 0 (4)."""
    enter = loop.enter_step

    def interrupt(state, at, *rest):
        if at == step:
            raise Interrupted
        return enter(state, at, *rest)

    monkeypatch.setattr(loop, "enter_step", interrupt)
    with pytest.raises(Interrupted):
        loop.run_steps(CONFIG, tmp_path, MODEL, SCHEDULER, teacher, Clips())
    monkeypatch.setattr(loop, "enter_step", enter)
    state, _ = loop.run_steps(CONFIG, tmp_path, MODEL, SCHEDULER, teacher, Clips())

    whole, whole_lines = uninterrupted
    jax.tree.map(np.testing.assert_array_equal, state, whole)
    assert lines(tmp_path) == whole_lines


@pytest.mark.slow
def test_a_run_on_a_teacher_of_bytes_is_nearly_the_run_and_goes_on_as_well(
    uninterrupted, teacher, tmp_path, monkeypatch
):
    config = {**CONFIG, "train": {**CONFIG["train"], "teacher_weights": "int8"}}

    def run(workdir) -> dict:
        copied = jax.tree.map(jnp.copy, teacher)
        state, held = loop.run_steps(config, workdir, MODEL, SCHEDULER, copied, Clips())
        assert held["blocks"]["ffn"]["up"]["codes"].dtype == jnp.int8
        assert copied["blocks"]["ffn"]["up"]["kernel"].is_deleted()
        return state

    whole, enter = run(tmp_path / "whole"), loop.enter_step
    losses = [
        [row["loss"] for row in rows] for rows in (lines(tmp_path / "whole"), uninterrupted[1])
    ]
    np.testing.assert_allclose(*losses, rtol=0.05)  # Weights are 0.5 % off.

    def interrupt(state, at, *rest):
        if at == 3:
            raise Interrupted
        return enter(state, at, *rest)

    monkeypatch.setattr(loop, "enter_step", interrupt)
    with pytest.raises(Interrupted):
        run(tmp_path / "stopped")
    monkeypatch.setattr(loop, "enter_step", enter)
    jax.tree.map(np.testing.assert_array_equal, run(tmp_path / "stopped"), whole)


def test_the_average_of_the_weights_is_part_of_the_state_and_not_the_last_weights(uninterrupted):
    state, _ = uninterrupted
    average, last = exported_params(state), state["params"]
    assert jax.tree.structure(average) == jax.tree.structure(last)
    assert not np.array_equal(average["proj_out"]["kernel"], last["proj_out"]["kernel"])


def test_the_rank_goes_to_zero_and_the_branch_leaves_parameters_and_moments(uninterrupted):
    state, records = uninterrupted
    assert [record["rank"] for record in records] == [2, 2, 1, 1, 0, 0]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    assert not [path for path in paths if getattr(path[-1], "key", None) in ("L", "R")]
    assert "small_singular_share" in records[3]
    assert "small_singular_share" not in records[4]


def test_the_norms_of_the_groups_add_up_to_the_gradients(uninterrupted):
    """In squares; the branch has one as long as there is a branch."""
    _, records = uninterrupted
    for record in records:
        parts = {name: x for name, x in record.items() if name.startswith("grad_norm_")}
        assert len(parts) == (4 if record["rank"] else 3)
        assert all(part > 0 for part in parts.values())
        # float32: two sums of some 200 squares in different order.
        assert sum(x**2 for x in parts.values()) == pytest.approx(
            record["grad_norm"] ** 2, rel=1e-5
        )


def test_the_logged_clips_are_the_means_of_all_learned_pairs(uninterrupted):
    state, records = uninterrupted
    leaves = jax.tree_util.tree_leaves_with_path(state["params"])
    for name, leaf in (("clip_low", "lower"), ("clip_high", "upper")):
        raw = np.concatenate([np.ravel(x) for path, x in leaves if path[-1].key == leaf])
        assert records[-1][name] == pytest.approx(np.mean(1 / (1 + np.exp(-raw))), rel=1e-5)


def test_all_phases_share_one_compilation_and_rank_zero_adds_one(uninterrupted):
    assert _WHOLE["programs"] == [1, 1]


@pytest.mark.slow
def test_accumulating_half_batches_gives_the_same_update(teacher):
    state = committed(loop.initial_state(CONFIG, MODEL, teacher))
    recipe = loop.make_recipe(CONFIG, MODEL, SCHEDULER, branch=True)
    halves = recipe._replace(train={**CONFIG["train"], "accumulate": 2})
    rows = [Clips()[i] for i in range(4)]
    batch = {
        name: np.stack([row[name] for row in rows])
        for name in ("latent_mean", "latent_logvar", "text_embeds")
    }
    batch["sample_index"] = np.arange(4, dtype=np.int32)
    empty = jnp.zeros((3, 8), jnp.float32)
    norms = [
        loop.compile_step(r)(jax.tree.map(jnp.copy, state), batch, teacher, empty, jnp.int32(3))[1]
        for r in (recipe, halves)
    ]
    # float32 sums in another order; no code lies near enough to a boundary to flip here.
    np.testing.assert_allclose(norms[0]["grad_norm"], norms[1]["grad_norm"], rtol=1e-3)
    np.testing.assert_allclose(norms[0]["loss"], norms[1]["loss"], rtol=1e-3)


def test_samples_draw_their_own_noise_and_time_whatever_their_batch():
    index = jnp.arange(4)
    keys = sample_keys(0, jnp.int32(7), index)
    noising = training_noise(SCHEDULER, {"shift": 1.0})
    batch = {
        "latent_mean": jnp.zeros((4, 1, 2, 2, 1)),
        "latent_logvar": jnp.zeros((4, 1, 2, 2, 1)),
        "text_embeds": jnp.ones((4, 2, 3)),
    }
    whole = noisy_inputs(batch, keys, noising, 0.5, jnp.zeros((2, 3)))
    assert len(np.unique(whole["latents"][:, 0, 0, 0, 0])) == 4
    assert len(np.unique(whole["timesteps"])) == 4
    part = jax.tree.map(lambda x: x[2:], batch)
    keys = sample_keys(0, jnp.int32(7), index[2:])
    alone = noisy_inputs(part, keys, noising, 0.5, jnp.zeros((2, 3)))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2:], b), whole, alone)


def test_every_parameter_has_the_rate_of_its_group(teacher):
    found = labels(loop.initial_state(CONFIG, MODEL, teacher)["params"])
    layer = found["blocks"]["attn1"]["to_q"]
    assert layer == {
        "kernel": "weights",
        "bias": "weights",
        "scale": "scales",
        "zero_point": "scales",
        "lower": "clips",
        "upper": "clips",
        "L": "branch",
        "R": "branch",
    }
    assert found["blocks"]["attn1"]["norm_q"]["scale"] == "weights"


def test_a_workdir_of_another_config_is_refused_by_the_value_that_differs(tmp_path):
    claim_workdir(tmp_path, CONFIG)
    claim_workdir(tmp_path, {**CONFIG, "train": {**CONFIG["train"], "log_every": 7}})
    other = {**CONFIG, "quant": {**CONFIG["quant"], "weight_bits": 3}}
    with pytest.raises(UserError, match=r"quant\.weight_bits: 4 there, 3 here"):
        claim_workdir(tmp_path, other)


def test_a_run_that_began_before_keys_were_added_goes_on_unless_they_say_otherwise(tmp_path):
    config, added = get_config().to_dict(), ("act_range", "buckets", "bits_file")
    old = {**config, "quant": {k: v for k, v in config["quant"].items() if k not in added}}
    added = ("freeze_weights", "scale_aware", "target", "teacher_weights")
    old["train"] = {k: v for k, v in config["train"].items() if k not in added}
    del old["method"], old["calibration"]
    claim_workdir(tmp_path, old)
    compare_workdir(tmp_path, config)
    other = {**config, "quant": {**config["quant"], "buckets": 10}}
    with pytest.raises(UserError, match=r"quant\.buckets: 50 there, 10 here"):
        compare_workdir(tmp_path, other)
