"""CogVideoX from prompt to frames, at the smallest sizes; numbers are held by the parity suite."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.autoencoders.cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from qvgen_jax.components import VAE, TextEncoder
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.diffusion.guidance import Guidance
from qvgen_jax.errors import UserError
from qvgen_jax.generation_config import COGVIDEOX_DEFAULTS
from qvgen_jax.models.cogvideox import CogVideoXTransformer
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.text.t5 import T5Config, T5Encoder
from qvgen_jax.text.tokenizer import COGVIDEOX_PROMPTS, load_tokenizer
from qvgen_jax.transformer import Transformer

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny_wan" / "tokenizer"
TRANSFORMER = CogVideoXConfig(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_embed_dim=16,
    time_embed_dim=8,
    num_layers=1,
    sample_height=2,
    sample_width=4,
    patch_size=(2, 2, 2),  # CogVideoX1.5's: three latent frames are filled up to four.
    use_rotary_positional_embeddings=True,
)
AUTOENCODER = CogVideoXVAEConfig(
    block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
)
TEXT = T5Config(
    vocab_size=126, d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, model_type="t5"
)
SMALL = {"num_frames": 9, "height": 16, "width": 32, "steps": 3, "max_length": 20}
PROMPTS = ["a red circle moving right", "a blue star moving up slowly"]


def _network(kind: type, config, build) -> object:
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(nnx.eval_shape(build), nnx.Param)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), nnx.to_pure_dict(state)
    )
    return kind(config, graphdef, (params,))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    key = jax.random.key(0)
    return Pipeline(
        _network(Transformer, TRANSFORMER, lambda: CogVideoXTransformer(TRANSFORMER, key=key)),
        _network(VAE, AUTOENCODER, lambda: CogVideoXVAE(AUTOENCODER, key=key)),
        _network(TextEncoder, TEXT, lambda: T5Encoder(TEXT, key=key)),
        load_tokenizer(TOKENIZER),
        CogVideoXDPMConfig(rescale_betas_zero_snr=True),
        COGVIDEOX_DEFAULTS | SMALL,
        prompt_rule=COGVIDEOX_PROMPTS,
    )


def test_as_many_frames_come_back_as_were_asked_for(pipe):
    frames = pipe.generate(PROMPTS[0], guidance=Guidance(3.0, dynamic=True))
    assert frames.shape == (1, 9, 16, 32, 3)
    with pytest.raises(UserError, match="num_frames is 5, expected 1 plus a multiple of 8"):
        pipe.generate(PROMPTS[0], num_frames=5)


def test_a_stochastic_sampler_does_not_see_the_batch(pipe):
    together = pipe.sample_latents(PROMPTS, seeds=[5, 6])
    alone = pipe.sample_latents(PROMPTS[1], seeds=6)
    np.testing.assert_array_equal(together[1:], alone)
    assert together.shape == (2, 3, 2, 4, 4)


def test_padding_is_attended_not_set_to_zero(pipe):
    embeds = np.asarray(pipe.encode_prompt(PROMPTS))
    assert embeds.shape == (2, 20, 16)
    assert np.abs(embeds).min(axis=-1).max() > 0
    assert np.abs(embeds[:, -1]).max() > 0


def test_a_flow_shift_is_refused(pipe):
    with pytest.raises(UserError, match=r"flow_shift is 3.0, .* does not sample a flow"):
        pipe.sample_latents(PROMPTS[0], flow_shift=3.0)
