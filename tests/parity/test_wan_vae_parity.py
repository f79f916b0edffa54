"""Our VAE against diffusers' AutoencoderKLWan on the same random weights, float32.

The slow test, at the widths of the real model:
python -m pytest -m slow tests/parity/test_wan_vae_parity.py
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch
from convert.wan_vae import name_table
from qvgen_jax.autoencoders.tiling import Tiling
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
FLAT = {
    "base_dim": 4,
    "z_dim": 3,
    "num_res_blocks": 1,
    "dim_mult": [1, 2],
    "temperal_downsample": [True],
    "scale_factor_spatial": 2,
}


def make_pair(fields):
    """diffusers' model and `run(method, x)` of ours."""
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

    def run(method, x, *options):
        # Compiled for the sake of its loops only, and quickly: the networks are tiny.
        call = jax.jit(
            lambda p, x: getattr(nnx.merge(graphdef, p), method)(x, *options),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        with jax.default_matmul_precision("highest"):
            return call(params, x)

    return theirs, run


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    return make_pair(CONFIGS[request.param])


@pytest.fixture(scope="module")
def tiled_pair():
    """With tiles of 8 x 12 pixels every 6 x 8; two pixels to a latent one."""
    theirs, run = make_pair(FLAT)
    theirs.enable_tiling(8, 12, 6, 8)
    tiling = Tiling(8, 12, stride_height=6, stride_width=8)
    return theirs, lambda method, x: run(method, x, tiling)


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
        for got, expected in ((mean, moments.mean), (logvar, moments.logvar)):
            hold("Wan VAE", "encode: odd sizes, chunked, whole and tiled", relative(got, expected))


@pytest.mark.parametrize("latent_frames", [1, 2, 4])
def test_decoded_videos_equal_diffusers(pair, latent_frames):
    theirs, run = pair
    shape = (2, latent_frames, 2, 3, theirs.config.z_dim)
    latents = 3 * np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        video = theirs.decode(to_torch_layout(latents)).sample
    error = relative(run("decode", latents), video)
    hold("Wan VAE", "decode: odd sizes, chunked, whole and tiled", error)
    error = relative(jnp.clip(run("decode_whole", latents), -1, 1), video)
    hold("Wan VAE", "decode: odd sizes, chunked, whole and tiled", error)


@pytest.mark.parametrize("size", [(10, 18), (4, 14), (8, 12)])
def test_tiled_moments_equal_diffusers(tiled_pair, size):
    theirs, run = tiled_pair
    video = np.random.default_rng(0).uniform(-1, 1, (1, 9, *size, 3)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(to_torch_layout(video)).latent_dist
    mean, logvar = run("encode", video)
    for got, expected in ((mean, moments.mean), (logvar, moments.logvar)):
        hold("Wan VAE", "encode: odd sizes, chunked, whole and tiled", relative(got, expected))


@pytest.mark.parametrize("size", [(5, 9), (7, 4), (4, 6)])
def test_tiled_videos_equal_diffusers(tiled_pair, size):
    theirs, run = tiled_pair
    latents = np.random.default_rng(1).standard_normal((1, 3, *size, 3)).astype(np.float32)
    with torch.no_grad():
        video = theirs.decode(to_torch_layout(latents)).sample
    error = relative(run("decode", latents), video)
    hold("Wan VAE", "decode: odd sizes, chunked, whole and tiled", error)


def test_the_default_tiling_is_that_of_diffusers():
    theirs = diffusers.AutoencoderKLWan(**FLAT, latents_mean=[0.0] * 3, latents_std=[1.0] * 3)
    strides = {
        "stride_height": theirs.tile_sample_stride_height,
        "stride_width": theirs.tile_sample_stride_width,
    }
    size = theirs.tile_sample_min_height, theirs.tile_sample_min_width
    assert WanVAEConfig().default_tiling == Tiling(*size, **strides)


@pytest.mark.slow
def test_the_real_widths_equal_diffusers():
    theirs, run = make_pair({"z_dim": 16})
    rng = np.random.default_rng(0)
    video = rng.uniform(-1, 1, (1, 5, 16, 24, 3)).astype(np.float32)
    latents = rng.standard_normal((1, 3, 2, 3, 16)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(to_torch_layout(video)).latent_dist
        decoded = theirs.decode(to_torch_layout(latents)).sample
    mean, logvar = run("encode", video)
    for got, expected in ((mean, moments.mean), (logvar, moments.logvar)):
        hold("Wan VAE", "encode: odd sizes, chunked, whole and tiled", relative(got, expected))
    error = relative(run("decode", latents), decoded)
    hold("Wan VAE", "decode: odd sizes, chunked, whole and tiled", error)
