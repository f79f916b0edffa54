"""A transformer in the sampling loop: any sampler, guided in any way, in one call."""

import jax
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.diffusion.cogvideox_ddim import CogVideoXDDIMConfig
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.diffusion.flow_euler import FlowEulerConfig
from qvgen_jax.diffusion.guidance import Guidance
from qvgen_jax.diffusion.schedulers import make_schedule
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig, WanTransformer
from qvgen_jax.transformer import Transformer

CONFIG = WanConfig(
    num_attention_heads=1,
    attention_head_dim=12,
    in_channels=2,
    out_channels=2,
    text_dim=6,
    freq_dim=8,
    ffn_dim=10,
    num_layers=1,
)
NOISE = np.random.default_rng(0).standard_normal((2, 1, 2, 2, 2)).astype(np.float32)
TEXT, NEGATIVE = np.random.default_rng(1).standard_normal((2, 2, 3, 6)).astype(np.float32)
SCHEDULE = make_schedule(FlowEulerConfig(flow_shift=3.0), 3)
DDIM = CogVideoXDDIMConfig(rescale_betas_zero_snr=True)
DPM = CogVideoXDPMConfig(rescale_betas_zero_snr=True)


@pytest.fixture(scope="module")
def transformer() -> Transformer:
    model = nnx.eval_shape(lambda: WanTransformer(CONFIG, key=jax.random.key(0)))
    graphdef, shapes = nnx.split(model)
    rng = np.random.default_rng(2)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), nnx.to_pure_dict(shapes)
    )
    return Transformer(CONFIG, graphdef, (params,))


def test_two_passes_change_rounding_only(transformer):
    batched = transformer.sample(NOISE, TEXT, NEGATIVE, 3.0, SCHEDULE)
    apart = transformer.sample(NOISE, TEXT, NEGATIVE, Guidance(3.0, two_passes=True), SCHEDULE)
    np.testing.assert_allclose(apart, batched, atol=1e-5)
    unguided = transformer.sample(NOISE, TEXT, None, 3.0, SCHEDULE)
    assert np.abs(batched - unguided).max() > 1e-3


def test_a_trajectory_without_a_guided_step_is_unguided(transformer):
    unguided = transformer.sample(NOISE, TEXT, None, 3.0, SCHEDULE)
    for guidance in (1.0, Guidance(3.0, unguided_steps=3)):
        off = transformer.sample(NOISE, TEXT, NEGATIVE, guidance, SCHEDULE)
        np.testing.assert_array_equal(off, unguided)


def test_a_stochastic_sampler_takes_a_key_per_video(transformer):
    schedule = make_schedule(CogVideoXDPMConfig(rescale_betas_zero_snr=True), 3)
    keys = jax.random.split(jax.random.key(5), 2)
    guidance = Guidance(3.0, unguided_steps=1)
    both = transformer.sample(NOISE, TEXT, NEGATIVE, guidance, schedule, keys)
    swapped = transformer.sample(
        NOISE[::-1], TEXT[::-1], NEGATIVE[::-1], guidance, schedule, keys[::-1]
    )
    np.testing.assert_allclose(swapped[::-1], both, atol=1e-6)
    with pytest.raises(UserError, match="step_noise is None"):
        transformer.sample(NOISE, TEXT, NEGATIVE, guidance, schedule)


@pytest.mark.parametrize("config", [UniPCConfig(), FlowEulerConfig(), DDIM, DPM])
def test_steps_one_by_one_end_where_the_scan_does(transformer, config):
    schedule = make_schedule(config, 4)
    keys = jax.random.split(jax.random.key(5), 2)
    for guidance in (Guidance(3.0, unguided_steps=2), Guidance(1.0)):
        asked = (NOISE, TEXT, NEGATIVE, guidance, schedule, keys)
        steps = list(transformer.steps(*asked))
        assert len(steps) == 4
        # Another program of the same sums: rounding, four times, times the guidance.
        np.testing.assert_allclose(steps[-1].latents, transformer.sample(*asked), atol=1e-5)
        assert all(step.clean.shape == NOISE.shape for step in steps)
    # At the last step's noise level of zero the sample is what the model sees behind the noise.
    np.testing.assert_allclose(steps[-1].clean, steps[-1].latents, atol=1e-5)


def test_steps_of_a_stochastic_sampler_ask_for_its_noise(transformer):
    with pytest.raises(UserError, match="step_noise is None"):
        next(transformer.steps(NOISE, TEXT, NEGATIVE, 3.0, make_schedule(DPM, 3)))
