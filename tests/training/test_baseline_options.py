"""What defines the baselines in the training step: frozen weights, rates by scale, the target."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs.tiny_w4a4 import get_config
from qvgen_jax.errors import UserError
from qvgen_jax.quant.schedule import boundaries, gate_at
from qvgen_jax.training.check import check_config
from qvgen_jax.training.optimizer import joined, labels, make_optimizer, split_frozen
from qvgen_jax.training.state import create_state, has_branch
from qvgen_jax.training.step import Recipe, distillation_loss, truth_loss
from qvgen_jax.training.student import rank_decay

RATES = {"weights": 1e-3, "branch": 4e-4, "scales": 1e-6, "clips": 5e-4}


def params() -> dict:
    def linear(scale: float) -> dict:
        return {
            "kernel": jnp.ones((2, 5, 3)),
            "bias": jnp.ones((2, 3)),
            "scale": jnp.full((2, 3), scale),
            "zero_point": jnp.zeros((2, 3)),
            "act_scale": jnp.ones((2, 4)),
            "act_zero_point": jnp.ones((2, 4)),
            "L": jnp.ones((2, 3, 1)),
            "R": jnp.ones((2, 1, 5)),
        }

    norm = {"scale": jnp.ones(5), "bias": jnp.ones(5)}
    return {"blocks": {"fine": linear(0.01), "coarse": linear(0.2), "norm": norm}, "table": norm}


def train(**changes) -> dict:
    section = {"steps": 100, "warmup_steps": 0, "learning_rate": RATES, "schedule": "constant_tail"}
    section |= {"tail_rate": 0.0, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
    return section | {"weight_decay": 0.0, "clip_norm": 1e9} | changes


def test_frozen_weights_have_no_moments_and_everything_else_has():
    whole = params()
    trained, frozen = split_frozen(whole, True)
    names = {path[-1].key for path, _ in jax.tree_util.tree_leaves_with_path(trained)}
    assert names == {"scale", "zero_point", "act_scale", "act_zero_point", "L", "R"}
    assert set(trained) == {"blocks"}
    assert "norm" not in trained["blocks"]
    assert set(jax.tree.leaves(labels(frozen))) == {"weights"}
    back = joined(trained, frozen)
    assert jax.tree.structure(back) == jax.tree.structure(whole)
    assert back["blocks"]["fine"]["kernel"] is whole["blocks"]["fine"]["kernel"]
    state = create_state(whole, {}, optax.scale_by_adam(), freeze_weights=True)
    assert jax.tree.structure(state["opt"].mu) == jax.tree.structure(trained)
    assert split_frozen(whole, False) == (whole, {})


def test_the_groups_of_learned_steps_and_of_a_partial_tree_are_those_of_the_whole():
    found = labels(params())["blocks"]
    assert found["fine"]["act_scale"] == found["fine"]["act_zero_point"] == "clips"
    assert found["fine"]["scale"] == "scales"
    assert found["norm"]["scale"] == "weights"
    trained = split_frozen(params(), True)[0]
    assert labels(trained)["blocks"]["fine"]["scale"] == "scales"


@pytest.mark.parametrize("scale_aware", [True, False])
def test_an_adapters_rate_is_in_proportion_to_its_layers_scale(scale_aware):
    """The first step of Adam moves by the rate, whatever the gradient."""
    trained = split_frozen(params(), True)[0]
    optimizer = make_optimizer(train(scale_aware=scale_aware))
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, -0.3), trained)
    updates, _ = optimizer.update(grads, optimizer.init(trained), trained)
    for name, scale in (("fine", 0.01), ("coarse", 0.2)):
        expected = 4e-4 * (scale if scale_aware else 1)
        for leaf in "LR":
            np.testing.assert_allclose(updates["blocks"][name][leaf], expected, rtol=1e-5)
        np.testing.assert_allclose(updates["blocks"][name]["scale"], 1e-6, rtol=1e-5)
        np.testing.assert_allclose(updates["blocks"][name]["act_scale"], 5e-4, rtol=1e-5)


def test_a_merged_adapter_lives_at_full_weight_to_the_end():
    config = get_config("efficient_dm").to_dict()
    decay, steps = rank_decay(config), config["train"]["steps"]
    assert boundaries(decay, steps) == ()
    assert has_branch(decay, steps)
    for step in (0, steps // 2, steps):
        np.testing.assert_array_equal(gate_at(step, decay), np.ones(32))


class Toy(nnx.Module):
    """Predicts a multiple of what it sees."""

    def __init__(self, factor: float):
        self.factor = nnx.Param(jnp.float32(factor))

    def __call__(self, latents, timesteps, text, gate=None):
        return self.factor[...] * latents


def recipe(**train) -> Recipe:
    graph = nnx.split(Toy(1.0), nnx.Param)[0]
    return Recipe(graph, graph, None, None, None, 1, {"truth_blend": 0.0, **train}, 0)


def inputs() -> dict:
    rng = np.random.default_rng(0)
    latents, velocity = (jnp.asarray(rng.normal(size=(3, 2, 2, 2, 2)), jnp.float32) for _ in "ab")
    timesteps = jnp.asarray([100.0, 500.0, 900.0])
    return {
        "latents": latents,
        "timesteps": timesteps,
        "text_embeds": jnp.zeros((3, 1, 1)),
        "velocity": velocity,
    }


def test_the_truth_alone_asks_no_teacher():
    seen = inputs()
    student = {"factor": jnp.float32(0.7)}
    loss, moved = truth_loss(student, {}, seen, None, recipe())
    expected = np.mean((0.7 * seen["latents"] - seen["velocity"]) ** 2)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert moved["teacher"] == 0


def test_mimicking_the_velocity_is_mimicking_the_noise_estimate():
    """Of x = (1 - s) clean + s noise, the estimate is `x + (1 - s) v`: one difference, weighted."""
    seen = inputs()
    student, teacher = ({"factor": jnp.float32(f)} for f in (0.7, 0.4))
    for sample in range(3):
        one = jax.tree.map(lambda x, i=sample: x[i : i + 1], seen)
        loss, _ = distillation_loss(student, {}, teacher, one, None, recipe())
        level = np.float64(one["timesteps"][0]) / 1000
        x = np.asarray(one["latents"], np.float64)
        estimates = [x + (1 - level) * factor * x for factor in (0.7, 0.4)]
        mimicking = np.mean((estimates[0] - estimates[1]) ** 2)
        np.testing.assert_allclose(loss, mimicking / (1 - level) ** 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("section", "changes", "remedy"),
    [
        ("train", {"target": "truth", "truth_blend": 5.0}, "set one of them back"),
        ("train", {"ema_decay": 0.9}, "a merged adapter stays; set it to 0"),
        ("quant", {"rank": 0}, "set --config.quant.rank=32"),
        ("quant", {"act_range": "static"}, "expected one of token, learned, learned_zero"),
        ("quant", {"buckets": 0}, "expected a number from 1"),
        ("train", {"target": "noise"}, "expected one of teacher, truth"),
        (
            "quant",
            {"rotation": "hadamard"},
            "learned_zero with .*; set smoothing=0 and rotation=none",
        ),
        ("quant", {"smoothing": 0.5}, "learned_zero with .*; set smoothing=0 and rotation=none"),
    ],
)
def test_what_contradicts_a_baseline_is_refused_with_the_remedy(section, changes, remedy):
    config = get_config("efficient_dm").to_dict()
    check_config(config)
    config[section] |= changes
    with pytest.raises(UserError, match=remedy):
        check_config(config)
