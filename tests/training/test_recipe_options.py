"""What defines each option of the recipe that lives in the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.tiny_w4a4 import get_config as tiny_w4a4
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.low_rank import refactor
from qvgen_jax.quant.schedule import RankDecay
from qvgen_jax.training.optimizer import learning_rates
from qvgen_jax.training.state import create_state, enter_step, exported_params
from qvgen_jax.training.step import Recipe, averaged, teacher_share
from qvgen_jax.training.student import quant_config

RATES = {"weights": 1e-3, "branch": 1e-3, "scales": 2e-4, "clips": 1e-2}


def train(**changes) -> dict:
    section = {"steps": 100, "warmup_steps": 10, "learning_rate": RATES}
    return {**section, "schedule": "cosine", "tail_rate": 0.0, **changes}


def test_the_teacher_has_the_noise_and_the_ground_truth_the_clean_end():
    share = teacher_share(jnp.asarray([0.0, 500.0, 1000.0]), 5.0)
    middle = (np.exp(2.5) - 1) / (np.exp(5.0) - 1)
    np.testing.assert_allclose(share, [0, middle, 1], rtol=1e-5)
    np.testing.assert_array_equal(teacher_share(jnp.asarray([0.0, 1000.0]), 0.0), 1)


def test_cosine_rates_end_at_zero_and_a_constant_tail_stays_level():
    cosine = learning_rates(train(), 60)["weights"]
    np.testing.assert_allclose([cosine(10), cosine(100)], [1e-3, 0], atol=1e-9)
    tail = learning_rates(train(schedule="constant_tail"), 60)["weights"]
    np.testing.assert_array_equal([tail(s) for s in (5, 35, 60)], [cosine(s) for s in (5, 35, 60)])
    np.testing.assert_array_equal([tail(s) for s in (61, 80, 99)], cosine(60))
    assert cosine(60) > 4e-4
    early = learning_rates(train(schedule="constant_tail"), 3)["weights"]
    assert early(99) > 0.99e-3  # A tail cannot begin within the warm-up.


def test_a_tail_with_a_rate_of_its_own_is_reached_by_a_cosine_that_ends_there():
    tail = learning_rates(train(schedule="constant_tail", tail_rate=0.1), 60)
    np.testing.assert_allclose([tail["weights"](s) for s in (60, 80, 99)], 1e-4, rtol=1e-5)
    np.testing.assert_allclose([tail["clips"](s) for s in (10, 70)], [1e-2, 1e-3], rtol=1e-5)
    assert tail["weights"](35) > 3e-4


def recipe(decay: RankDecay, ema_decay: float) -> Recipe:
    return Recipe(*[None] * 2, decay, *[None] * 3, {"ema_decay": ema_decay}, 0)


def test_the_average_starts_where_the_branch_has_gone():
    decay = RankDecay(phase_steps=5, rank=2)  # Ends at step 10.
    ema, params = (
        {"kernel": jnp.zeros(3)},
        {"kernel": jnp.ones(3), "L": jnp.ones(1), "R": jnp.ones(1)},
    )
    steps = (0, 9, 10, 13, 1000)
    found = [averaged(ema, params, jnp.int32(s), recipe(decay, 0.9))["kernel"][0] for s in steps]
    np.testing.assert_allclose(found, [1, 1, 0.9, 9 / 13, 0.1], rtol=1e-6)


def test_at_rank_0_the_average_does_not_export_the_start():
    """100 updates at 0.99 alone would leave 37 % of the first weights in it."""
    options = recipe(RankDecay(phase_steps=1, rank=0), 0.99)
    update = jax.jit(lambda ema, step: averaged(ema, {"kernel": jnp.ones(1)}, step, options))
    ema = {"kernel": jnp.zeros(1)}
    for step in range(100):
        ema = update(ema, jnp.int32(step))
    assert 0 < 1 - ema["kernel"][0] < 1e-6


def test_what_ships_is_the_average_where_there_is_one():
    params = {"a": {"kernel": jnp.ones((2, 2)), "L": jnp.ones((2, 1)), "R": jnp.ones((1, 2))}}
    plain = create_state(params, {}, optax.sgd(1.0))
    assert exported_params(plain) is plain["params"]
    assert set(exported_params(create_state(params, {}, optax.sgd(1.0), average=True))["a"]) == {
        "kernel"
    }


def branch(stack: tuple[int, ...] = ()) -> dict:
    keys = jax.random.split(jax.random.key(1))
    return {
        "L": jax.random.normal(keys[0], (*stack, 7, 4)),
        "R": jax.random.normal(keys[1], (*stack, 4, 9)),
    }


@pytest.mark.parametrize("stack", [(), (2,)])
def test_rotated_moments_are_those_of_the_turned_gradients(stack):
    """After one Adam step from zero the first moment is a share of the gradient, also turned."""
    params = {"a": branch(stack)}

    def loss(params):
        node = params["a"]
        return jnp.sum(jnp.sin(node["L"] @ node["R"]))

    adam = optax.scale_by_adam(b1=0.9)
    _, opt = adam.update(jax.grad(loss)(params), adam.init(params))
    state = {"params": params, "levels": {}, "opt": (opt,), "step": jnp.int32(1)}
    # The same rank again, so that nothing dies and the whole gradient can be compared.
    decay = RankDecay(phase_steps=1, rank=8)
    turned = enter_step(jax.tree.map(jnp.copy, state), 1, decay, "rotate")
    expected = jax.grad(loss)(turned["params"])["a"]
    for side in ("L", "R"):
        # float32, through two pseudo-inverses.
        np.testing.assert_allclose(turned["opt"][0].mu["a"][side], 0.1 * expected[side], atol=1e-4)
        assert np.all(turned["opt"][0].nu["a"][side] >= 0)
    kept = enter_step(jax.tree.map(jnp.copy, state), 1, decay, "keep")
    np.testing.assert_array_equal(kept["opt"][0].mu["a"]["L"], opt.mu["a"]["L"])
    reset = enter_step(jax.tree.map(jnp.copy, state), 1, decay, "reset")
    assert not reset["opt"][0].mu["a"]["L"].any()


@pytest.mark.parametrize("moments", ["reset", "rotate", "keep"])
@pytest.mark.parametrize("refactor", [True, False])
def test_a_boundary_copies_nothing_but_branches(moments, refactor):
    params = {"a": {"kernel": jnp.ones((9, 7)), **branch()}, "norm": {"scale": jnp.ones(7)}}
    adam = optax.scale_by_adam()
    state = {"params": params, "opt": (adam.init(params),), "step": jnp.int32(1)}
    entered = enter_step(state, 1, RankDecay(phase_steps=1, rank=4, refactor=refactor), moments)
    assert entered["params"]["a"]["kernel"] is params["a"]["kernel"]
    assert entered["params"]["norm"]["scale"] is params["norm"]["scale"]
    for name in ("mu", "nu"):
        before, after = (getattr(each["opt"][0], name) for each in (state, entered))
        assert after["a"]["kernel"] is before["a"]["kernel"]
    assert not entered["params"]["a"]["L"][:, 2:].any()
    assert entered["params"]["a"]["L"][:, :2].all()


def test_without_refactoring_columns_that_live_keep_their_moments():
    params = {"a": branch()}
    adam = optax.scale_by_adam()
    opt = adam.init(params)._replace(mu=params, nu=params)
    state = {"params": params, "levels": {}, "opt": (opt,), "step": jnp.int32(1)}
    decay = RankDecay(phase_steps=1, rank=4, refactor=False)
    kept = enter_step(jax.tree.map(jnp.copy, state), 1, decay, "keep")
    np.testing.assert_array_equal(kept["opt"][0].mu["a"]["L"], params["a"]["L"])
    after = enter_step(jax.tree.map(jnp.copy, state), 1, decay, "reset")
    np.testing.assert_array_equal(after["params"]["a"]["L"][:, :2], params["a"]["L"][:, :2])
    np.testing.assert_array_equal(after["params"]["a"]["L"][:, 2:], 0)
    for moments in (after["opt"][0].mu["a"], after["opt"][0].nu["a"]):
        np.testing.assert_array_equal(moments["L"], after["params"]["a"]["L"])
        np.testing.assert_array_equal(moments["R"], after["params"]["a"]["R"])
    refactored = refactor(params["a"]["L"], params["a"]["R"], 2)[0]
    assert np.abs(refactored - after["params"]["a"]["L"]).max() > 0.1


def test_bits_for_a_layer_in_full_precision_are_refused():
    quant = {**tiny_w4a4().quant.to_dict(), "bits": (("proj_out", 8, 8),)}
    model = WanConfig(num_layers=2, num_attention_heads=2, attention_head_dim=4)
    assert quant_config(quant, model).bits_of("proj_out") == (8, 8)
    with pytest.raises(UserError, match=r"asks \(8, 8\) bits of 'proj_out', which stays in full"):
        quant_config({**quant, "full_precision": ("proj_out",)}, model)
    quant |= {"bits": (("condition_embedder.time_proj", 8, 8),), "time_table": True}
    with pytest.raises(UserError, match="time_proj', which stays in full precision"):
        quant_config(quant, model)
