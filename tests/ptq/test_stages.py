"""A transformer run block by block says what it says as a whole; its tokens are measured right."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.models import build_transformer, quantizable
from qvgen_jax.ptq.stages import (
    Stage,
    in_batches,
    linears_of,
    part_of,
    plain_network,
    predict,
    run_stage,
    stages_of,
)
from qvgen_jax.ptq.statistics import Observer
from qvgen_jax.quant.dense import Dense
from qvgen_jax.training.teacher import teacher_definition
from tests.ptq.models import MODELS, inputs, random_params


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]


def test_the_streamed_forward_is_the_whole_one(model):
    params, args = random_params(model), inputs(model)
    whole = nnx.merge(teacher_definition(model, jnp.float32), params)
    expected = jax.jit(whole)(*args)
    network = plain_network(model, jnp.float32)
    found = predict(network, model, params, in_batches(args, 2), None)
    # Other batches and programs: float32 sums in another order.
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def test_every_linear_belongs_to_one_stage(model):
    names = [name for kind in ("embed", "block", "head") for name in linears_of(kind, model)]
    assert sorted(names) == sorted(quantizable(model))
    assert len(stages_of(model)) == model.num_layers + 2


def recorded(model, params, args) -> dict[str, np.ndarray]:
    """The tokens of every linear in a plain forward of the whole, by name: `[layers, rows, in]`."""
    found: dict[str, list[np.ndarray]] = {}

    class Recorded(Dense):
        def __call__(self, x, *rest):
            def record(x):
                found.setdefault(self.name, []).append(np.asarray(x).reshape(-1, x.shape[-1]))

            jax.debug.callback(record, x, ordered=True)
            return super().__call__(x, *rest)

    network = nnx.eval_shape(
        lambda: build_transformer(model, key=jax.random.key(0), dense=Recorded, remat="none")
    )
    nnx.merge(nnx.split(network, nnx.Param)[0], params)(*args)
    jax.effects_barrier()
    return {name: np.stack(each) for name, each in found.items()}


@pytest.mark.slow
def test_maxima_moments_and_rows_are_those_of_a_plain_forward(model):
    params, args = random_params(model), inputs(model)
    expected, network = recorded(model, params, args), plain_network(model, jnp.float32)
    batches = in_batches(args, 2)
    for stage in stages_of(model):
        names = linears_of(stage.kind, model)
        observer = Observer(model, jnp.float32, stage.kind, names, rows=6, seed=0, moments=True)
        part = part_of(params, stage)
        for name, seen in observer(part, batches, None).items():
            tokens = expected[name][stage.index]
            scale = np.abs(tokens).max()
            np.testing.assert_allclose(seen.maxima, np.abs(tokens).max(0), atol=1e-5 * scale)
            moments = tokens.T @ tokens
            np.testing.assert_allclose(seen.gram, moments, atol=1e-4 * np.abs(moments).max())
            assert seen.rows.shape == (12, tokens.shape[1])
            nearest = np.abs(tokens[:, None] - np.asarray(seen.rows)).max(2).min(0)
            np.testing.assert_allclose(nearest, 0, atol=1e-4 * scale)
        batches = run_stage(network, stage, part, batches, None)


def test_measuring_costs_no_backward_pass():
    model = MODELS["wan"]
    stage, params = Stage("block"), random_params(model)
    names, args = linears_of("block", model), in_batches(inputs(model), 4)
    network = plain_network(model, jnp.float32)
    args = run_stage(network, Stage("embed"), part_of(params, Stage("embed")), args, None)[0]
    observer = Observer(model, jnp.float32, "block", names, rows=6, seed=0, moments=False)
    part = part_of(params, stage)
    measured = observer.lower(part, args).compile().cost_analysis()["flops"]
    run = jax.jit(lambda part, args: network.run("block", part, args))
    plain = run.lower(part, args).compile().cost_analysis()["flops"]
    assert measured < 1.2 * plain  # With a backward pass: about three times as many.
