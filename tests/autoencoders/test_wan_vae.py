"""Wan's VAE: equal to diffusers' recorded outputs, and to itself in one pass or in chunks."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch, to_torch
from convert.wan_vae import name_table
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig, denormalize, normalize
from qvgen_jax.errors import UserError
from tests.golden.tiny_models import WAN_VAE

GOLDEN = Path(__file__).parent.parent / "golden/wan_vae.npz"
TINY = WAN_VAE | {"latents_mean": [0.5, -1.0], "latents_std": [2.0, 0.25]}


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
    """`run(method, x)` on the golden weights, compiled, float32."""
    return compiled(weights, jnp.float32)


def compiled(weights, dtype):
    config = WanVAEConfig.from_json(TINY)
    params = from_torch(name_table(config), weights)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    model = nnx.eval_shape(lambda: WanVAE(config, key=jax.random.key(0), dtype=dtype))
    graphdef, _ = nnx.split(model, nnx.Param)

    def run(method, x, *options):
        # Tiny networks take longer to compile well than to run.
        call = jax.jit(
            lambda p, x: getattr(nnx.merge(graphdef, p), method)(x, *options),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        with jax.default_matmul_precision("highest"):
            return call(params, x)

    return run


def video_of(golden, name="video"):
    return golden[name].astype(np.float32) / 127.5 - 1


def relative(a, b):
    return float(np.max(np.abs(np.asarray(a) - b)) / np.max(np.abs(b)))


def test_encoding_in_chunks_gives_what_diffusers_gave(vae, golden):
    mean, logvar = vae("encode", video_of(golden))
    assert mean.shape == (1, 3, 1, 2, 2)
    assert relative(mean, golden["mean"]) < 1e-4  # float32 round-off through thirty layers
    assert relative(logvar, golden["logvar"]) < 1e-4


def test_decoding_in_chunks_gives_what_diffusers_gave(vae, golden):
    video = vae("decode", golden["latents"].astype(np.float32))
    assert video.shape == (1, 9, 8, 16, 3)
    assert relative(video, golden["decoded"].astype(np.float32)) < 5e-4  # recorded in float16


def test_tiles_give_what_diffusers_tiles_gave(vae, golden):
    tiling = Tiling(16, 24, stride_height=16, stride_width=16)
    mean, _ = vae("encode", video_of(golden, "wide_video"), tiling)
    assert relative(mean, golden["wide_mean"]) < 1e-4
    video = vae("decode", golden["wide_latents"].astype(np.float32), tiling)
    assert relative(video, golden["wide_decoded"].astype(np.float32)) < 5e-4


def test_encoding_whole_equals_encoding_in_chunks(vae, golden):
    for a, b in zip(
        vae("encode_whole", video_of(golden)), vae("encode", video_of(golden)), strict=True
    ):
        assert relative(a, np.asarray(b)) < 1e-4  # the same sums in another order


def test_decoding_whole_equals_decoding_in_chunks_but_for_the_clip(vae, golden):
    latents = golden["latents"].astype(np.float32)
    whole = jnp.clip(vae("decode_whole", latents), -1, 1)
    assert relative(whole, np.asarray(vae("decode", latents))) < 1e-4


def test_one_frame_is_coded_as_the_first_of_a_clip(vae, golden):
    video, latents = video_of(golden), golden["latents"].astype(np.float32)
    mean, _ = vae("encode", video[:, :1])
    assert relative(mean, golden["mean"][:, :1]) < 1e-4
    first = vae("decode", latents[:, :1])
    assert relative(first, golden["decoded"][:, :1].astype(np.float32)) < 5e-4


def test_later_frames_do_not_change_earlier_latents(vae, golden):
    video = video_of(golden)
    changed = video.copy()
    changed[:, 5:] = 0
    a, b = vae("encode_whole", video)[0], vae("encode_whole", changed)[0]
    np.testing.assert_array_equal(a[:, :2], b[:, :2])
    assert np.abs(a[:, 2] - b[:, 2]).max() > 0


def test_bfloat16_stays_near_float32(weights, golden):
    mean, _ = compiled(weights, jnp.bfloat16)("encode_whole", video_of(golden))
    assert mean.dtype == jnp.float32
    assert relative(mean, golden["mean"]) < 0.1  # 8 bits of mantissa through thirty layers


def test_weights_survive_the_way_to_pytorch_and_back(weights):
    table = name_table(WanVAEConfig.from_json(TINY))
    back = to_torch(table, from_torch(table, weights))
    assert back.keys() == weights.keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(back[name], value)


def test_normalized_latents_come_back_and_the_variance_scales_with_them():
    config = WanVAEConfig.from_json(TINY)
    latents = np.random.default_rng(0).standard_normal((1, 2, 1, 3, 2)).astype(np.float32)
    logvar = np.full_like(latents, -3.0)
    scaled, scaled_logvar = normalize(config, latents, logvar)
    np.testing.assert_allclose(scaled[..., 0], (latents[..., 0] - 0.5) / 2, rtol=1e-6)
    np.testing.assert_allclose(scaled_logvar[..., 1], -3 - 2 * np.log(0.25), rtol=1e-6)
    np.testing.assert_allclose(denormalize(config, scaled), latents, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "shape", [(1, 4, 16, 24, 3), (1, 5, 20, 24, 3), (1, 5, 16, 12, 3), (1, 3, 16, 16, 3)]
)
def test_a_video_that_does_not_divide_is_refused(vae, shape):
    with pytest.raises(UserError, match=r"multiple of 4.*multiples of 8"):
        vae("encode", np.zeros(shape, np.float32))


@pytest.mark.parametrize(
    ("field", "value"), [("is_residual", True), ("patch_size", 2), ("attn_scales", [0.5])]
)
def test_the_vae_of_wan_2_2_is_refused_by_name(field, value):
    with pytest.raises(UserError, match=f"{field} = .*Wan 2.1"):
        WanVAEConfig.from_json({**TINY, field: value})


def test_statistics_of_the_wrong_length_are_refused():
    with pytest.raises(UserError, match=r"latents_std is .*as many values as z_dim = 2"):
        WanVAEConfig.from_json({**TINY, "latents_std": [1.0, 1.0, 1.0]})


def test_another_autoencoder_is_refused_by_name():
    with pytest.raises(UserError, match="AutoencoderKLCogVideoX"):
        WanVAEConfig.from_json({"_class_name": "AutoencoderKLCogVideoX"})


def test_the_published_config_is_read():
    fields = {**TINY, "decoder_base_dim": None, "is_residual": False, "patch_size": None}
    fields |= {"attn_scales": [], "dropout": 0.0, "scale_factor_spatial": 8}
    config = WanVAEConfig.from_json(json.loads(json.dumps(fields)))
    assert (config.temporal_factor, config.spatial_factor) == (4, 8)
