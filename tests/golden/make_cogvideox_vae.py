"""Makes cogvideox_vae.npz: what diffusers' AutoencoderKLCogVideoX says of clips, with its weights.

Run: python tests/golden/make_cogvideox_vae.py (needs torch and diffusers).
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLCogVideoX
from tiny_models import COGVIDEOX_VAE


def to_torch(x: np.ndarray) -> torch.Tensor:
    """`[b, t, h, w, c]` to `[b, c, t, h, w]`."""
    return torch.from_numpy(x.astype(np.float32)).permute(0, 4, 1, 2, 3)


def to_numpy(x: torch.Tensor) -> np.ndarray:
    """`[b, c, t, h, w]` to `[b, t, h, w, c]`."""
    return x.permute(0, 2, 3, 4, 1).numpy()


def main() -> None:
    rng = np.random.default_rng(0)
    model = AutoencoderKLCogVideoX(**COGVIDEOX_VAE).eval()
    weights = {}
    for name, tensor in model.state_dict().items():
        norm = tensor.ndim == 1 and name.endswith("weight")
        spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
        # The last convolution is damped, so that no pixel reaches the clip.
        spread *= 0.05 if name.startswith("decoder.conv_out") else 1
        values = spread * rng.standard_normal(tuple(tensor.shape)) + norm
        weights[name] = values.astype(np.float16)
    model.load_state_dict({k: torch.from_numpy(v.astype(np.float32)) for k, v in weights.items()})
    video = rng.integers(0, 256, (1, 19, 8, 12, 3)).astype(np.uint8)
    wide_video = rng.integers(0, 256, (1, 1, 8, 20, 3)).astype(np.uint8)
    latents = rng.standard_normal((1, 5, 2, 3, 2)).astype(np.float16)
    wide_latents = rng.standard_normal((1, 3, 2, 5, 2)).astype(np.float16)
    with torch.no_grad():
        moments = model.encode(to_torch(video / 127.5 - 1)).latent_dist
        decoded = model.decode(to_torch(latents)).sample
        model.enable_tiling(16, 12, 1 / 4, 1 / 3)  # strides of 12 and 8 pixels
        wide_moments = model.encode(to_torch(wide_video / 127.5 - 1)).latent_dist
        wide_decoded = model.decode(to_torch(wide_latents)).sample
    assert max(decoded.abs().max(), wide_decoded.abs().max()) < 1
    np.savez_compressed(
        Path(__file__).with_name("cogvideox_vae.npz"),
        video=video,
        mean=to_numpy(moments.mean),
        logvar=to_numpy(moments.logvar),
        latents=latents,
        decoded=to_numpy(decoded).astype(np.float16),  # in [-1, 1]: 2.5e-4 at worst
        wide_video=wide_video,
        wide_mean=to_numpy(wide_moments.mean),
        wide_latents=wide_latents,
        wide_decoded=to_numpy(wide_decoded).astype(np.float16),
        # One vector: a hundred small members would cost more than they hold.
        weights=np.concatenate([value.ravel() for value in weights.values()]),
        shapes=json.dumps({name: value.shape for name, value in weights.items()}),
    )


if __name__ == "__main__":
    main()
