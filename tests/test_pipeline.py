"""Generation, on a random pipeline of the smallest sizes, written and read in diffusers' layout."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qvgen_jax
from convert.save import save_pipeline
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig
from qvgen_jax.diffusion.guidance import Guidance
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig, WanTransformer
from qvgen_jax.pipeline import to_uint8
from qvgen_jax.text.t5 import T5Config, T5Encoder

TOKENIZER = Path(__file__).parents[1] / "assets" / "tiny_wan" / "tokenizer"
TRANSFORMER = WanConfig(
    num_attention_heads=2,
    attention_head_dim=12,
    in_channels=4,
    out_channels=4,
    text_dim=16,
    freq_dim=16,
    ffn_dim=40,
    num_layers=2,
)
VAE = WanVAEConfig(
    base_dim=4,
    z_dim=4,
    dim_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    latents_mean=(0.1, -0.2, 0.3, 0.0),
    latents_std=(0.5, 1.5, 2.0, 1.0),
)
TEXT = T5Config(vocab_size=126, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)
DEFAULTS = {"num_frames": 5, "height": 16, "width": 32, "steps": 2, "guidance_scale": 2.0, "fps": 8}
PROMPTS = ["a red circle moving right", "a blue star moving up slowly", "a green cross"]


def _random_params(build) -> dict:
    """Small random values in the shapes of a model, drawn without compiling its initializers."""
    rng = np.random.default_rng(0)
    shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(build), nnx.Param))
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32) + (leaf.ndim < 2), shapes
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, key = tmp_path_factory.mktemp("tiny") / "pipeline", jax.random.key(0)
    save_pipeline(
        folder,
        transformer=(TRANSFORMER, _random_params(lambda: WanTransformer(TRANSFORMER, key=key))),
        vae=(VAE, _random_params(lambda: WanVAE(VAE, key=key))),
        text_encoder=(TEXT, _random_params(lambda: T5Encoder(TEXT, key=key))),
        tokenizer_folder=TOKENIZER,
        generation_config=DEFAULTS,
    )
    return folder


@pytest.fixture(scope="module")
def pipe(folder):
    return qvgen_jax.load(folder)


def test_settings_come_from_the_folder(pipe):
    frames = pipe.generate(PROMPTS[:2])
    assert frames.shape == (2, 5, 16, 32, 3)
    assert frames.dtype == np.uint8
    # The tokenizer's own length, and the family's guidance to the end.
    assert pipe.defaults == {**DEFAULTS, "max_length": 32, "unguided_steps": 0}


def test_a_video_does_not_depend_on_its_batch(pipe):
    together = pipe.sample_latents(PROMPTS, seeds=[5, 6, 7])
    reversed_order = pipe.sample_latents(PROMPTS[::-1], seeds=[7, 6, 5])
    alone = pipe.sample_latents(PROMPTS[1], seeds=6)
    np.testing.assert_array_equal(together, reversed_order[::-1])
    np.testing.assert_array_equal(together[1:2], alone)


def test_larger_batches_change_rounding_only(pipe):
    one_by_one = pipe.sample_latents(PROMPTS, seeds=[5, 6, 7])
    # Three videos in twos: the second batch is filled up, and cut again.
    in_twos = pipe.sample_latents(PROMPTS, seeds=[5, 6, 7], batch_size=2)
    np.testing.assert_allclose(in_twos, one_by_one, atol=1e-5)


def test_one_seed_means_the_same_noise_for_every_prompt(pipe):
    both = pipe.sample_latents([PROMPTS[0], PROMPTS[0]], seeds=3)
    np.testing.assert_array_equal(both[0], both[1])
    other = pipe.sample_latents(PROMPTS[0], seeds=4)
    assert np.abs(other[0] - both[0]).max() > 0.1


def test_given_latents_replace_the_seed_and_set_the_size(pipe):
    noise = jax.random.normal(jax.random.key(3), (2, 2, 4, 4))
    from_seed = pipe.sample_latents(PROMPTS[0], seeds=3, height=16, width=32)
    np.testing.assert_array_equal(pipe.sample_latents(PROMPTS[0], latents=noise[None]), from_seed)
    larger = np.zeros((1, 3, 4, 2, 4), np.float32)
    assert pipe.sample_latents(PROMPTS[0], latents=larger).shape == larger.shape


def test_one_guided_step_is_the_formula(pipe):
    noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 4, 4))
    text, empty = (pipe.encode_prompt(prompt) for prompt in (PROMPTS[0], ""))
    timestep = jnp.array([999.0])  # 1000 (1 - 1e-6), cut to a whole number as diffusers does
    with_text = pipe.transformer(noise, timestep, text)
    without = pipe.transformer(noise, timestep, empty)
    expected = noise - (1 - 1e-6) * (without + 3.0 * (with_text - without))
    ours = pipe.sample_latents(PROMPTS[0], latents=noise, steps=1, guidance_scale=3.0)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_negative_prompts_count_only_with_guidance(pipe):
    plain = pipe.sample_latents(PROMPTS[0], guidance_scale=1)
    same = pipe.sample_latents(PROMPTS[0], negative_prompts="a star", guidance_scale=0.5)
    np.testing.assert_array_equal(plain, same)
    guided = pipe.sample_latents(PROMPTS[0])
    other = pipe.sample_latents(PROMPTS[0], negative_prompts=["a star"])
    assert np.abs(guided - other).max() > 1e-4


def test_prompts_are_cut_at_their_end_and_zero_padded(pipe):
    embeds = pipe.encode_prompt([PROMPTS[0], "", PROMPTS[0]], max_length=12)
    lengths = [int(np.any(row != 0, axis=-1).sum()) for row in np.asarray(embeds)]
    assert embeds.shape == (3, 12, 16)
    assert 1 < lengths[0] < 12
    assert lengths[1] == 1  # the end mark alone
    np.testing.assert_array_equal(embeds[0], embeds[2])
    longer = pipe.encode_prompt("  a red\n circle moving &amp;lt; right ", max_length=12)
    assert longer.shape == (1, 12, 16)


def test_latents_and_video_go_to_and_from_the_normalised_space(pipe):
    video = jnp.clip(jax.random.normal(jax.random.key(1), (1, 5, 16, 32, 3)), -1, 1)
    mean, std = np.array(VAE.latents_mean), np.array(VAE.latents_std)
    raw = pipe.vae.encode(video)
    latents = pipe.to_latents(video)
    np.testing.assert_allclose(latents, (raw - mean) / std, atol=1e-5)
    np.testing.assert_allclose(pipe.to_video(latents), pipe.vae.decode(raw), atol=1e-5)
    posterior_mean, logvar = pipe.vae_posterior(video)
    np.testing.assert_array_equal(posterior_mean, latents)
    raw_logvar = pipe.vae.posterior(video)[1]
    np.testing.assert_allclose(logvar, raw_logvar - 2 * np.log(std), atol=1e-5)


def test_frames_are_rounded_as_diffusers_does():
    # 255 (x / 2 + 1 / 2), to the nearest, halves to even; what leaves [-1, 1] is clipped.
    video = np.array([-1.5, -1.0, 0.0, 1 / 255 - 1, 2 / 255 - 1, 1.0, 2.0])
    np.testing.assert_array_equal(to_uint8(video), [0, 0, 128, 0, 1, 255, 255])


def test_another_transformer_fits_into_the_pipeline(pipe):
    params = jax.tree.map(lambda leaf: -leaf, pipe.transformer.states[0])
    changed = pipe.with_transformer(pipe.transformer.graphdef, params)
    ours, theirs = (p.sample_latents(PROMPTS[0]) for p in (pipe, changed))
    assert np.abs(ours - theirs).max() > 0.1
    np.testing.assert_array_equal(pipe.sample_latents(PROMPTS[0]), ours)


def test_a_mesh_gives_the_same_videos(pipe, folder):
    mesh = jax.make_mesh((1,), ("data",))
    spread = qvgen_jax.load(folder, mesh=mesh)
    np.testing.assert_allclose(
        spread.sample_latents(PROMPTS[0]), pipe.sample_latents(PROMPTS[0]), atol=1e-5
    )


def test_bfloat16_shortens_matrices_but_not_the_timestep_path(pipe, folder):
    short = qvgen_jax.load(folder, dtype="bfloat16")
    params = short.transformer.states[0]
    assert params["blocks"]["attn1"]["to_q"]["kernel"].dtype == jnp.bfloat16
    assert params["blocks"]["attn1"]["to_q"]["bias"].dtype == jnp.float32
    assert params["condition_embedder"]["time_proj"]["kernel"].dtype == jnp.float32
    assert params["blocks"]["scale_shift_table"].dtype == jnp.float32
    noise = jax.random.normal(jax.random.key(0), (1, 2, 2, 4, 4))
    text, timestep = pipe.encode_prompt(PROMPTS[0]), jnp.array([500.0])
    expected = pipe.transformer(noise, timestep, text)
    ours = short.transformer(noise, timestep, text)
    # bfloat16 keeps 8 bits: a few per cent after two blocks.
    assert jnp.abs(ours - expected).max() < 0.05 * jnp.abs(expected).max()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": [3]}, "prompts"),
        ({"num_frames": 6}, "use 5"),
        ({"num_frames": 0}, "num_frames"),
        ({"height": 40}, "multiple of 16; use 32"),
        ({"width": 8}, "multiple of 16; use 16"),
        ({"steps": 0}, "steps"),
        ({"steps": 2**31 - 1}, "from 1 to 10000"),
        ({"flow_shift": float("nan")}, "flow_shift is nan, expected a number above 0"),
        ({"flow_shift": 1e308}, "below 1000"),
        ({"flow_shift": "3"}, "flow_shift is '3'"),
        ({"prompts": "\ud800"}, "is not Unicode text"),
        ({"prompts": "a" * 100_001}, "expected at most 100000; shorten it"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"seeds": [1, 2]}, "2 seeds for 1 prompts"),
        ({"seeds": -1}, "seed is -1"),
        ({"seeds": 2**32}, "seed is"),
        ({"negative_prompts": ["a", "b"]}, "2 negative prompts for 1"),
        ({"latents": np.zeros((2, 2, 2, 4, 4))}, "latents are"),
        ({"latents": np.zeros((2, 2, 4))}, "latents are"),
        ({"batch_size": 0}, "batch_size"),
        ({"max_length": 0}, "max_length"),
    ],
)
def test_a_bad_argument_is_named(pipe, changes, message):
    with pytest.raises(UserError, match=message):
        pipe.generate(**{"prompts": PROMPTS[0], **changes})


def test_uint8_video_is_refused_by_the_encoder(pipe):
    with pytest.raises(UserError, match=r"127\.5"):
        pipe.to_latents(np.zeros((1, 5, 16, 16, 3), np.uint8))


def test_unknown_types_are_refused(folder):
    with pytest.raises(UserError, match="float32 or bfloat16"):
        qvgen_jax.load(folder, dtype="int8")


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="not a folder"):
        qvgen_jax.load(tmp_path / "missing")


def test_a_hub_name_that_cannot_be_fetched_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="did not come from the Hugging Face hub"):
        qvgen_jax.load("owner/no-such-model")


def _damaged(folder: Path, tmp_path: Path, file: str, content: bytes | None) -> Path:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / file).unlink()
    if content is not None:
        (copy / file).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model_index.json", None, "model_index.json is missing"),
        ("model_index.json", b'{"_class_name": "CogVideoXPipeline"}', "CogVideoXPipeline"),
        ("scheduler/scheduler_config.json", b"{", "does not read as JSON"),
        ("generation_config.json", b'{"step": 3}', "unknown fields"),
        ("transformer/diffusion_pytorch_model.safetensors", None, "0 .safetensors files"),
        ("transformer/diffusion_pytorch_model.safetensors", b"x" * 40, "does not read"),
    ],
)
def test_a_damaged_folder_is_explained(folder, tmp_path, file, content, message):
    with pytest.raises(UserError, match=message):
        qvgen_jax.load(_damaged(folder, tmp_path, file, content))


def test_weights_of_another_size_are_refused(folder, tmp_path):
    path = folder / "transformer/config.json"
    fields = json.loads(path.read_text()) | {"ffn_dim": 48}
    content = json.dumps(fields).encode()
    copy = _damaged(folder, tmp_path, "transformer/config.json", content)
    with pytest.raises(UserError, match=r"expected .* by config.json"):
        qvgen_jax.load(copy)


def test_weights_in_several_files_are_read_through_their_index(pipe, folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path = copy / "transformer/diffusion_pytorch_model.safetensors"
    tensors, where = load_file(path), {}
    path.unlink()
    for part in range(3):
        file = f"diffusion_pytorch_model-{part + 1:05}-of-00003.safetensors"
        names = sorted(tensors)[part::3]
        save_file({name: tensors[name] for name in names}, path.with_name(file))
        where |= dict.fromkeys(names, file)
    index = path.with_name("diffusion_pytorch_model.safetensors.index.json")
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    sharded = qvgen_jax.load(copy)
    same = jax.tree.map(np.array_equal, sharded.transformer.states, pipe.transformer.states)
    assert jax.tree.all(same)


def test_a_freed_text_encoder_stays_on_the_host_and_gives_the_same_embeddings(folder, pipe):
    freed = qvgen_jax.load(folder, free_text_encoder=True)
    np.testing.assert_array_equal(freed.encode_prompt(PROMPTS), pipe.encode_prompt(PROMPTS))
    kinds = {type(leaf) for leaf in jax.tree.leaves(freed.text_encoder.states)}
    assert kinds == {np.ndarray}


def test_text_weights_in_a_byte_each_stay_near(folder, pipe):
    exact = pipe.encode_prompt(PROMPTS)
    near = qvgen_jax.load(folder, text_weights="int8").encode_prompt(PROMPTS)
    # Random layers 16 wide; a real one 4096 wide is within 1.5 %.
    assert 0 < np.linalg.norm(near - exact) < 0.05 * np.linalg.norm(exact)


def test_a_video_within_one_tile_decodes_as_without_tiles(pipe):
    latents = np.random.default_rng(0).standard_normal((1, 2, 2, 4, 4)).astype(np.float32)
    whole = pipe.to_video(latents)
    np.testing.assert_array_equal(pipe.to_video(latents, tiling=True), whole)
    tiles = Tiling(8, 16, stride_height=8, stride_width=8)
    assert pipe.to_video(latents, tiling=tiles).shape == whole.shape


def test_guidance_may_stop_before_the_last_steps(pipe):
    scaled = pipe.sample_latents(PROMPTS[0], guidance_scale=2.0)
    same = pipe.sample_latents(PROMPTS[0], guidance=Guidance(2.0))
    np.testing.assert_array_equal(same, scaled)
    stopped = pipe.sample_latents(PROMPTS[0], guidance=Guidance(2.0, unguided_steps=2))
    unguided = pipe.sample_latents(PROMPTS[0], guidance_scale=1.0)
    np.testing.assert_allclose(stopped, unguided, atol=1e-5)  # Both steps; two programs.


def test_a_folder_may_end_its_videos_unguided_and_another_length_in_proportion(pipe):
    defaults = {**pipe.defaults, "guidance_scale": 2.0, "steps": 4, "unguided_steps": 2}
    ending = dataclasses.replace(pipe, defaults=defaults)
    for steps, unguided in ((4, 2), (2, 1)):
        explicit = Guidance(2.0, unguided_steps=unguided)
        expected = pipe.sample_latents(PROMPTS[0], steps=steps, guidance=explicit)
        np.testing.assert_array_equal(ending.sample_latents(PROMPTS[0], steps=steps), expected)
