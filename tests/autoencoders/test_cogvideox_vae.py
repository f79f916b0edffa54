"""CogVideoX's VAE: equal to diffusers' recorded outputs, in its batches of frames and in tiles."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.cogvideox_vae import name_table
from convert.names import from_torch, to_torch
from qvgen_jax.autoencoders.cogvideox import (
    CogVideoXVAE,
    CogVideoXVAEConfig,
    denormalize,
    normalize,
)
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.errors import UserError
from tests.golden.tiny_models import COGVIDEOX_VAE as TINY

GOLDEN = Path(__file__).parent.parent / "golden/cogvideox_vae.npz"
PUBLISHED = {
    "_class_name": "AutoencoderKLCogVideoX",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 256, 512],
    "down_block_types": ["CogVideoXDownBlock3D"] * 4,
    "up_block_types": ["CogVideoXUpBlock3D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "invert_scale_latents": False,
    "latent_channels": 16,
    "latents_mean": None,
    "latents_std": None,
    "layers_per_block": 3,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_height": 480,
    "sample_width": 720,
    "scaling_factor": 1.15258426,
    "shift_factor": None,
    "temporal_compression_ratio": 4,
    "use_post_quant_conv": False,
    "use_quant_conv": False,
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def weights(golden) -> dict[str, np.ndarray]:
    shapes = json.loads(str(golden["shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(golden["weights"], ends)
    return {k: v.reshape(shape) for (k, shape), v in zip(shapes.items(), parts, strict=True)}


@pytest.fixture(scope="module")
def vae(weights):
    """`run(method, x)` on the golden weights, float32."""
    return compiled(weights, jnp.float32)


def compiled(weights, dtype):
    config = CogVideoXVAEConfig.from_json(TINY)
    params = from_torch(name_table(config), weights)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    model = nnx.eval_shape(lambda: CogVideoXVAE(config, key=jax.random.key(0), dtype=dtype))
    graphdef, _ = nnx.split(model, nnx.Param)

    def run(method, x, tiling=None):
        # Tiny networks take longer to compile well than to run.
        call = jax.jit(
            lambda p, x: getattr(nnx.merge(graphdef, p), method)(x, tiling),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        with jax.default_matmul_precision("highest"):
            return call(params, x)

    return run


def to_video(frames):
    return frames.astype(np.float32) / 127.5 - 1


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


def test_nineteen_frames_encode_as_eleven_and_eight_like_diffusers(vae, golden):
    mean, logvar = vae("encode", to_video(golden["video"]))
    assert mean.shape == (1, 5, 2, 3, 2)
    assert relative(mean, golden["mean"]) < 1e-4  # float32 round-off through twenty layers
    assert relative(logvar, golden["logvar"]) < 1e-4


def test_five_latent_frames_decode_as_three_and_two_like_diffusers(vae, golden):
    video = vae("decode", golden["latents"].astype(np.float32))
    assert video.shape == (1, 17, 8, 12, 3)
    assert relative(video, golden["decoded"].astype(np.float32)) < 5e-4  # recorded in float16


def test_tiles_give_what_diffusers_tiles_gave(vae, golden):
    tiling = Tiling(16, 12, stride_height=12, stride_width=8)
    mean, _ = vae("encode", to_video(golden["wide_video"]), tiling)
    assert relative(mean, golden["wide_mean"]) < 1e-4
    video = vae("decode", golden["wide_latents"].astype(np.float32), tiling)
    assert relative(video, golden["wide_decoded"].astype(np.float32)) < 5e-4


def test_later_batches_do_not_change_earlier_frames(vae, golden):
    latents = golden["latents"].astype(np.float32)
    first = vae("decode", latents[:, :3])
    assert relative(first, golden["decoded"][:, :9].astype(np.float32)) < 5e-4


def test_bfloat16_stays_near_float32(weights, golden):
    latents = golden["latents"].astype(np.float32)[:, :3]
    video = compiled(weights, jnp.bfloat16)("decode", latents)
    assert video.dtype == jnp.float32
    expected = golden["decoded"][:, :9].astype(np.float32)
    assert relative(video, expected) < 0.1  # 8 bits of mantissa through twenty layers


def test_weights_survive_the_way_to_pytorch_and_back(weights):
    table = name_table(CogVideoXVAEConfig.from_json(TINY))
    back = to_torch(table, from_torch(table, weights))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


def test_the_published_model_has_as_many_parameters_as_that_of_diffusers():
    config = CogVideoXVAEConfig.from_json(PUBLISHED)
    model = nnx.eval_shape(lambda: CogVideoXVAE(config, key=jax.random.key(0)))
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    assert sum(leaf.size for leaf in leaves) == 215_583_907
    assert (config.temporal_factor, config.spatial_factor) == (4, 8)
    assert config.default_tiling == Tiling(240, 360, stride_height=200, stride_width=288)


def test_normalized_latents_come_back_and_the_variance_scales_with_them():
    config = CogVideoXVAEConfig.from_json({**PUBLISHED, "scaling_factor": 0.7})
    latents = np.random.default_rng(0).standard_normal((1, 2, 1, 3, 16)).astype(np.float32)
    scaled, logvar = normalize(config, latents, np.full_like(latents, -3.0))
    np.testing.assert_allclose(scaled, 0.7 * latents, rtol=1e-6)
    np.testing.assert_allclose(logvar, -3 + 2 * np.log(0.7), rtol=1e-6)
    np.testing.assert_allclose(denormalize(config, scaled), latents, rtol=1e-6)


def test_video_latents_of_1_5_scale_like_the_others_though_its_images_do_not():
    plain = CogVideoXVAEConfig.from_json(PUBLISHED)
    inverted = CogVideoXVAEConfig.from_json({**PUBLISHED, "invert_scale_latents": True})
    assert normalize(inverted, 2.0) == normalize(plain, 2.0)


def test_a_video_that_does_not_divide_is_refused(vae):
    with pytest.raises(UserError, match=r"10 x 12 cannot be encoded.*multiples of 4"):
        vae("encode", np.zeros((1, 1, 10, 12, 3), np.float32))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("_class_name", "AutoencoderKLWan", "AutoencoderKLWan.*AutoencoderKLCogVideoX"),
        ("use_quant_conv", True, "use_quant_conv = True.*False"),
        ("latents_mean", [0.0], "latents_mean = .*None"),
        ("shift_factor", 0.1, "shift_factor = 0.1"),
        ("act_fn", "gelu", "act_fn = 'gelu'.*'silu'"),
        ("up_block_types", ["UpBlock2D"] * 4, "up_block_types.*CogVideoXUpBlock3D"),
        ("norm_num_groups", 48, "norm_num_groups is 48.*divisor"),
        ("temporal_compression_ratio", 3, "temporal_compression_ratio is 3.*power of two"),
    ],
)
def test_another_vae_is_refused_by_the_field_that_differs(field, value, message):
    with pytest.raises(UserError, match=message):
        CogVideoXVAEConfig.from_json({**PUBLISHED, field: value})
