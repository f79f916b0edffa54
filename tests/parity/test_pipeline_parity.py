"""Prompt to frames against diffusers' WanPipeline, from the same folder and the same noise."""

from pathlib import Path

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

import qvgen_jax  # noqa: E402
from qvgen_jax.diffusion.guidance import Guidance  # noqa: E402
from tests.golden.tiny_models import COGVIDEOX_VARIANTS, WAN_SAVED  # noqa: E402
from tests.parity.table import hold  # noqa: E402

FRAMES = "Prompt to frames (mean difference, of 1)"
TINY_WAN = Path(__file__).parents[2] / "assets" / "tiny_wan"
TRAINED = (TINY_WAN / "transformer" / "diffusion_pytorch_model.safetensors").exists()
PROMPTS = [
    "a red circle moving right slowly on a black background",
    "a  cyan star moving up-left &amp; quickly on a gray background",
    "",
]


@pytest.fixture(scope="module", autouse=True)
def _full_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _random_folder(folder: Path) -> Path:
    """Written by diffusers and transformers themselves; odd sizes, two layers of everything."""
    torch.manual_seed(0)
    transformer = diffusers.WanTransformer3DModel(**WAN_SAVED)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.3, -0.2, 0.1, 0.0],
        latents_std=[1.5, 0.5, 0.8, 2.0],
    )
    text_config = transformers.UMT5Config(
        vocab_size=126,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(TINY_WAN / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer.eval(),
    ).save_pretrained(folder)
    return folder


def _diffusers_frames(folder, prompts, noise, steps, guidance_scale, negative=None):
    """Float frames in [0, 1], `[batch, f, h, w, 3]`."""
    pipe = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = noise.shape[1:4]
    return pipe(
        prompt=prompts,
        negative_prompt=negative,
        height=8 * height,
        width=8 * width,
        num_frames=4 * frames - 3,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        latents=torch.tensor(noise.transpose(0, 4, 1, 2, 3)),
        max_sequence_length=32,
        output_type="np",
    ).frames


def _difference(frames: np.ndarray, theirs: np.ndarray) -> float:
    """Mean absolute difference of uint8 frames, in units of 1/255."""
    return np.abs(frames.astype(np.float64) - np.round(255.0 * theirs)).mean()


def test_a_random_pipeline_written_by_diffusers_gives_the_same_frames(tmp_path):
    folder = _random_folder(tmp_path / "pipeline")
    noise = np.random.default_rng(0).standard_normal((3, 2, 4, 6, 4)).astype(np.float32)
    negative = ["a blue square", "", "noise, noise"]
    theirs = _diffusers_frames(folder, PROMPTS, noise, 5, 3.5, negative)
    pipe = qvgen_jax.load(folder)
    arguments = {"latents": noise, "steps": 5, "guidance_scale": 3.5, "max_length": 32}
    latents = pipe.sample_latents(PROMPTS, negative, **arguments)
    video = np.asarray(pipe.to_video(latents))
    # Float32 rounding through 10 calls of the transformer and the decoder.
    assert np.abs(video / 2 + 0.5 - theirs).max() <= 1e-4
    frames = pipe.generate(PROMPTS, negative, **arguments)
    hold(
        "Prompt to frames (mean difference, of 1)", "Wan, random", _difference(frames, theirs) / 255
    )


@pytest.mark.skipif(not TRAINED, reason="assets/tiny_wan holds no trained weights")
def test_the_trained_tiny_pipeline_gives_the_same_frames():
    pipe = qvgen_jax.load(TINY_WAN)
    shape = (len(PROMPTS), 5, 8, 8, 16)
    noise = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    settings = pipe.defaults["steps"], pipe.defaults["guidance_scale"]
    theirs = _diffusers_frames(TINY_WAN, PROMPTS, noise, *settings)
    ours = pipe.generate(PROMPTS, latents=noise, max_length=32)
    assert ours.shape == theirs.shape
    difference = _difference(ours, theirs) / 255
    hold(FRAMES, "Wan, trained tiny", difference, 1 / 255)


def _random_cogvideox(folder: Path, variant: str) -> Path:
    """As `_random_folder`, of CogVideoX; its weights are random beyond their initial scale."""
    torch.manual_seed(1)
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_embed_dim=24,
        time_embed_dim=12,
        num_layers=2,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=32,
        **COGVIDEOX_VARIANTS[variant],
    )
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 16),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=4,
        sample_height=32,
        sample_width=48,
        scaling_factor=0.7,
    )
    text_config = transformers.T5Config(
        vocab_size=126,
        d_model=24,
        d_kv=6,
        d_ff=40,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    diffusers.CogVideoXPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(TINY_WAN / "tokenizer"),
        text_encoder=transformers.T5EncoderModel(text_config).eval(),
        vae=vae.eval(),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
        ),
        transformer=transformer.eval(),
    ).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("variant", "dynamic"), [("2b", False), ("5b", True), ("1_5", False)])
def test_a_random_cogvideox_gives_the_same_frames(variant, dynamic, tmp_path):
    """From the prompt on. Three latent frames: of 1.5 a fourth goes in front and is dropped."""
    folder = _random_cogvideox(tmp_path / "pipeline", variant)
    frames = 4 if variant == "1_5" else 3
    noise = np.random.default_rng(0).standard_normal((3, frames, 4, 6, 4)).astype(np.float32)
    negative = ["a blue square", "", "noise, noise"]
    theirs = diffusers.CogVideoXPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        prompt=PROMPTS,
        negative_prompt=negative,
        height=32,
        width=48,
        num_frames=9,
        num_inference_steps=5,
        guidance_scale=3.5,
        use_dynamic_cfg=dynamic,
        latents=torch.tensor(noise.transpose(0, 1, 4, 2, 3)),
        max_sequence_length=32,
        output_type="np",
    ).frames
    pipe = qvgen_jax.load(folder)
    video = pipe.generate(
        PROMPTS,
        negative,
        num_frames=9,
        steps=5,
        latents=noise,
        max_length=32,
        height=32,
        width=48,
        guidance=Guidance(3.5, dynamic=dynamic),
    )
    assert video.shape == expected.shape
    difference = _difference(video, expected) / 255
    hold(FRAMES, f"CogVideoX {variant}, random", difference)
