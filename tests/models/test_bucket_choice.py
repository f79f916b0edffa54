"""Which of its clip pairs a network takes, with more or fewer of them than the release's 50."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.packed import packed_definition
from qvgen_jax.models import TransformerConfig, abstract_params, config_from_json, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.training.student import student_definition
from tests.models.test_packed_forward import COGVIDEOX, WAN, inputs

TIMESTEPS = np.asarray([0.0, 9.5, 10.0, 333.0, 999.0], np.float32)


def trained(config: TransformerConfig, quant: QuantConfig) -> tuple:
    """Definition and shapes of the states, as those of `packed`."""
    states = jax.eval_shape(
        lambda params: quantize_params(params, quantizable(config), quant), abstract_params(config)
    )
    return student_definition(config, quant, jnp.float32, branch=False), states


def packed(config: TransformerConfig, quant: QuantConfig) -> tuple:
    definition = packed_definition(config, quant, jnp.float32)
    return definition.graphdef, (definition.shapes, definition.levels)


@pytest.mark.parametrize("buckets", [10, 100])
@pytest.mark.parametrize("form", [trained, packed])
@pytest.mark.parametrize("fields", [WAN, COGVIDEOX], ids=["wan", "cogvideox"])
def test_timesteps_are_spread_over_all_pairs_that_layers_have(fields, form, buckets):
    config = config_from_json(fields)
    graphdef, states = form(config, QuantConfig(rank=0, buckets=buckets))
    states = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), states)
    latents, _, text = inputs(config, jnp.float32)
    latents, text = (jnp.repeat(x[:1], len(TIMESTEPS), axis=0) for x in (latents, text))

    @jax.jit
    def chosen(states: tuple, timesteps: jax.Array) -> jax.Array:
        _, conditions = nnx.merge(graphdef, *states).embed(latents, timesteps, text)
        return conditions.ctx.clip_index  # All that layers know of the choice.

    found = chosen(states, TIMESTEPS)
    np.testing.assert_array_equal(found, (TIMESTEPS * buckets // 1000).astype(int))
