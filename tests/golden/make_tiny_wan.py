"""Makes tiny_wan.npz: a video of the trained tiny pipeline, sampled by diffusers' WanPipeline.

Run: python tests/golden/make_tiny_wan.py (needs torch and diffusers), again whenever the weights of
assets/tiny_wan change. The settings are those of the folder's generation_config.json.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch

FOLDER = Path(__file__).parents[2] / "assets" / "tiny_wan"
PROMPT = "a magenta triangle moving down-left slowly on a gray background"


def main() -> None:
    settings = json.loads((FOLDER / "generation_config.json").read_text())
    noise = np.random.default_rng(0).standard_normal((1, 16, 5, 8, 8)).astype(np.float32)
    pipe = diffusers.WanPipeline.from_pretrained(FOLDER, torch_dtype=torch.float32)
    arguments = {
        "prompt": PROMPT,
        "height": settings["height"],
        "width": settings["width"],
        "num_frames": settings["num_frames"],
        "num_inference_steps": settings["steps"],
        "guidance_scale": settings["guidance_scale"],
        "max_sequence_length": settings["max_length"],
    }
    latents = pipe(**arguments, latents=torch.tensor(noise), output_type="latent").frames
    frames = pipe(**arguments, latents=torch.tensor(noise), output_type="np").frames
    np.savez_compressed(
        Path(__file__).with_name("tiny_wan.npz"),
        prompt=PROMPT,
        latents=latents.numpy().transpose(0, 2, 3, 4, 1).astype(np.float16),
        frames=np.round(frames[:, ::8] * 255).astype(np.uint8),  # the first, middle and last
    )


if __name__ == "__main__":
    main()
