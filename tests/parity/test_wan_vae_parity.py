"""Our VAE against diffusers' AutoencoderKLWan on the same random weights, float32."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch
from convert.wan_vae import name_table
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig
from tests.parity.table import hold

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "tiny": {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1},
    "wide_decoder": {"base_dim": 8, "z_dim": 6, "num_res_blocks": 2, "decoder_base_dim": 12},
    "time_first": {
        "base_dim": 4,
        "z_dim": 3,
        "num_res_blocks": 1,
        "dim_mult": [1, 2, 4],
        "temperal_downsample": [True, True],
    },
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """diffusers' model and `run(method, x)` of ours."""
    fields = CONFIGS[request.param]
    z = fields["z_dim"]
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLWan(
        **fields, latents_mean=[0.0] * z, latents_std=[1.0] * z
    ).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith(("gamma", "bias")):  # The initial 1 and ~0 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    config = WanVAEConfig.from_json(json.loads(theirs.to_json_string()))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params = from_torch(name_table(config), state)
    model = nnx.eval_shape(lambda: WanVAE(config, key=jax.random.key(0)))
    graphdef, _ = nnx.split(model, nnx.Param)

    def run(method, x):
        with jax.default_matmul_precision("highest"):
            return jax.jit(lambda p, x: getattr(nnx.merge(graphdef, p), method)(x))(params, x)

    return theirs, run


def to_torch_layout(x):
    return torch.from_numpy(x).permute(0, 4, 1, 2, 3)


def relative(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 4, 1).numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_moments_equal_diffusers(pair, frames):
    theirs, run = pair
    video = np.random.default_rng(0).uniform(-1, 1, (2, frames, 16, 24, 3)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(to_torch_layout(video)).latent_dist
    for method in ("encode", "encode_whole"):
        mean, logvar = run(method, video)
        for ours, reference in ((mean, moments.mean), (logvar, moments.logvar)):
            hold("Wan VAE", "encode: chunked and whole", relative(ours, reference))


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_decoded_videos_equal_diffusers(pair, latent_frames):
    theirs, run = pair
    shape = (2, latent_frames, 2, 3, theirs.config.z_dim)
    latents = 3 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        video = theirs.decode(to_torch_layout(latents)).sample
    for got in (run("decode", latents), jnp.clip(run("decode_whole", latents), -1, 1)):
        hold("Wan VAE", "decode: chunked and whole", relative(got, video))
