"""Our VAE against diffusers' AutoencoderKLCogVideoX on the same random weights, float32.

The slow test, at the widths of the real models:
python -m pytest -m slow tests/parity/test_cogvideox_vae_parity.py
"""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from convert.cogvideox_vae import name_table
from convert.names import from_torch, to_torch, torch_names
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from qvgen_jax.autoencoders.tiling import Tiling
from tests.parity.table import hold

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = {
    "tiny": {
        "block_out_channels": [4, 8, 8, 12],
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "time_once": {
        "block_out_channels": [6, 6, 12],
        "down_block_types": ["CogVideoXDownBlock3D"] * 3,
        "up_block_types": ["CogVideoXUpBlock3D"] * 3,
        "latent_channels": 3,
        "layers_per_block": 2,
        "norm_num_groups": 2,
        "norm_eps": 1e-2,
        "temporal_compression_ratio": 2,
    },
    "flat": {
        "block_out_channels": [4, 8],
        "down_block_types": ["CogVideoXDownBlock3D"] * 2,
        "up_block_types": ["CogVideoXUpBlock3D"] * 2,
        "latent_channels": 3,
        "layers_per_block": 1,
        "norm_num_groups": 2,
        "temporal_compression_ratio": 2,
    },
}


def make_pair(fields):
    """diffusers' model, its configuration for us, and `run(method, x)` of ours."""
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKLCogVideoX(**fields).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.ndim == 1:  # The initial 1 and ~0 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
        theirs.decoder.conv_out.conv.weight.mul_(0.1)  # So that no pixel reaches the clip.
        theirs.decoder.conv_out.conv.bias.mul_(0.1)
    config = CogVideoXVAEConfig.from_json(json.loads(theirs.to_json_string()))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    params = from_torch(name_table(config), state)
    model = nnx.eval_shape(lambda: CogVideoXVAE(config, key=jax.random.key(0)))
    graphdef, _ = nnx.split(model, nnx.Param)

    def run(method, x, tiling=None):
        # Compiled for the sake of its loops only, and quickly: the networks are tiny.
        call = jax.jit(
            lambda p, x: getattr(nnx.merge(graphdef, p), method)(x, tiling),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        with jax.default_matmul_precision("highest"):
            return call(params, x)

    return theirs, run


@pytest.fixture(scope="module")
def pairs():
    return {name: make_pair(fields) for name, fields in CONFIGS.items()}


@pytest.fixture(scope="module")
def tiled_pair(pairs):
    """With tiles of 8 x 12 pixels every 6 x 8; two pixels to a latent one."""
    theirs, run = pairs["flat"]
    theirs.enable_tiling(8, 12, 1 / 4, 1 / 3)
    tiling = Tiling(8, 12, stride_height=6, stride_width=8)
    return theirs, lambda method, x: run(method, x, tiling)


def to_torch_layout(x):
    return torch.from_numpy(x).permute(0, 4, 1, 2, 3)


def relative(ours, theirs):
    theirs = theirs.permute(0, 2, 3, 4, 1).numpy()
    assert ours.shape == theirs.shape
    return float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())


def check_encode(theirs, run, shape):
    video = np.random.default_rng(0).uniform(-1, 1, (*shape, 3)).astype(np.float32)
    with torch.no_grad():
        moments = theirs.encode(to_torch_layout(video)).latent_dist
    mean, logvar = run("encode", video)
    for got, expected in ((mean, moments.mean), (logvar, moments.logvar)):
        hold(
            "CogVideoX VAE", "encode: odd sizes, chunked, whole and tiled", relative(got, expected)
        )


def check_decode(theirs, run, shape):
    latents = np.random.default_rng(1).standard_normal((*shape, theirs.config.latent_channels))
    latents = latents.astype(np.float32)
    with torch.no_grad():
        video = theirs.decode(to_torch_layout(latents)).sample
    assert video.abs().max() < 1  # Ours is clipped there, theirs is not.
    error = relative(run("decode", latents), video)
    hold("CogVideoX VAE", "decode: odd sizes, chunked, whole and tiled", error)


# Alone; one batch; two even ones; an odd first one of up to fifteen; time halved once.
@pytest.mark.parametrize(
    ("name", "frames"), [("tiny", 1), ("tiny", 6), ("tiny", 16), ("tiny", 29), ("time_once", 11)]
)
def test_moments_equal_diffusers(pairs, name, frames):
    check_encode(*pairs[name], (2, frames, 16, 24))


@pytest.mark.parametrize(
    ("name", "latent_frames"),
    [("tiny", 1), ("tiny", 2), ("tiny", 4), ("tiny", 7), ("time_once", 5)],
)
def test_decoded_videos_equal_diffusers(pairs, name, latent_frames):
    check_decode(*pairs[name], (2, latent_frames, 2, 3))


@pytest.mark.parametrize("size", [(10, 18), (4, 14), (8, 12)])
def test_tiled_moments_equal_diffusers(tiled_pair, size):
    check_encode(*tiled_pair, (1, 17, *size))


@pytest.mark.parametrize("size", [(5, 9), (7, 4), (4, 6)])
def test_tiled_videos_equal_diffusers(tiled_pair, size):
    check_decode(*tiled_pair, (1, 5, *size))


def test_the_default_tiling_is_that_of_diffusers():
    theirs = diffusers.AutoencoderKLCogVideoX(**CONFIGS["tiny"])
    config = CogVideoXVAEConfig.from_json(json.loads(theirs.to_json_string()))
    height, width = theirs.tile_sample_min_height, theirs.tile_sample_min_width
    strides = {
        "stride_height": int(height * (1 - theirs.tile_overlap_factor_height)),
        "stride_width": int(width * (1 - theirs.tile_overlap_factor_width)),
    }
    assert config.default_tiling == Tiling(height, width, **strides)


def test_exported_weights_are_those_that_diffusers_saved():
    theirs = diffusers.AutoencoderKLCogVideoX(**CONFIGS["tiny"])
    table = name_table(CogVideoXVAEConfig.from_json(json.loads(theirs.to_json_string())))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


def test_every_tensor_of_the_published_model_has_its_place():
    with torch.device("meta"):
        state = diffusers.AutoencoderKLCogVideoX().state_dict()
    assert sorted(torch_names(name_table(CogVideoXVAEConfig()))) == sorted(state)
    assert sum(tensor.numel() for tensor in state.values()) == 215_583_907


@pytest.mark.slow
def test_the_real_widths_equal_diffusers():
    pair = make_pair({})
    check_decode(*pair, (1, 5, 2, 3))
    check_encode(*pair, (1, 17, 16, 24))
