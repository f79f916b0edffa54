"""Which clip pair a timestep uses."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.quant.clips import clip_index


def test_buckets_split_the_timesteps_evenly_and_include_a_thousand():
    timesteps = np.arange(1001)
    index = np.asarray(clip_index(jnp.asarray(timesteps, jnp.float32)))
    np.testing.assert_array_equal(index, np.minimum(timesteps * 50 // 1000, 49))
    assert index.dtype == np.int32


def test_both_guidance_branches_and_training_use_the_same_pair():
    timesteps = jnp.asarray([987.5, 20.0, 19.99], jnp.float32)
    index = clip_index(timesteps)
    np.testing.assert_array_equal(clip_index(jnp.concatenate([timesteps] * 2)), [*index, *index])
    np.testing.assert_array_equal(index, [49, 1, 0])


def test_released_modes():
    timesteps = jnp.asarray([999.7, 50.0, 3.0], jnp.float32)
    np.testing.assert_array_equal(clip_index(timesteps, "t_mod_50"), [49, 0, 3])
    np.testing.assert_array_equal(clip_index(timesteps, "last"), [49, 49, 49])


def test_countdown_asks_for_an_index_from_outside():
    with pytest.raises(ValueError, match="pass clip_index="):
        clip_index(jnp.zeros(1), "countdown")
    with pytest.raises(ValueError, match="'nearest'; expected one of bucket"):
        clip_index(jnp.zeros(1), "nearest")
