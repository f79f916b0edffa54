"""The trained tiny pipeline against a video that diffusers made with it."""

from pathlib import Path

import numpy as np
import pytest

import qvgen_jax

FOLDER = Path(__file__).parents[1] / "assets" / "tiny_wan"
WEIGHTS = FOLDER / "transformer" / "diffusion_pytorch_model.safetensors"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="assets/tiny_wan holds no trained weights")
def test_the_trained_pipeline_makes_the_video_of_diffusers():
    golden = np.load(Path(__file__).parent / "golden" / "tiny_wan.npz")
    noise = np.random.default_rng(0).standard_normal((1, 16, 5, 8, 8)).astype(np.float32)
    pipe = qvgen_jax.load(FOLDER)
    latents = pipe.sample_latents(str(golden["prompt"]), latents=noise.transpose(0, 2, 3, 4, 1))
    # Stored in float16, which keeps three digits.
    np.testing.assert_allclose(latents, golden["latents"].astype(np.float32), atol=0.02)
    difference = np.abs(pipe.to_frames(latents)[:, ::8].astype(int) - golden["frames"])
    assert difference.mean() < 1.0  # of 255
