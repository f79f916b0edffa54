"""Makes wan_transformer.npz: diffusers' WanTransformer3DModel on two inputs, and its weights.

Run: python tests/golden/make_wan_transformer.py (needs torch and diffusers).
"""

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from tiny_models import WAN

INPUTS = {  # latents [b, f, h, w, c], timesteps, text tokens
    "video": ((2, 3, 4, 6, 2), (1000.0, 437.5), 3),
    "image": ((1, 1, 2, 2, 2), (1.0,), 1),
}


def random_weights(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    weights = {}
    for name, tensor in model.state_dict().items():
        spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
        values = spread * rng.standard_normal(tuple(tensor.shape))
        is_scale = ".norm" in name and name.endswith("weight")
        weights[name] = (values + is_scale).astype(np.float16)
    model.load_state_dict({k: torch.from_numpy(v.astype(np.float32)) for k, v in weights.items()})
    return weights


def main() -> None:
    rng = np.random.default_rng(0)
    model = WanTransformer3DModel(**WAN).eval()
    weights = random_weights(model, rng)
    arrays = {}
    for name, (shape, timesteps, tokens) in INPUTS.items():
        latents = rng.standard_normal(shape).astype(np.float32)
        text = rng.standard_normal((shape[0], tokens, WAN["text_dim"])).astype(np.float32)
        times = np.array(timesteps, np.float32)
        with torch.no_grad():
            x = torch.from_numpy(latents).permute(0, 4, 1, 2, 3)
            out = model(x, torch.from_numpy(times), torch.from_numpy(text)).sample
        velocity = out.permute(0, 2, 3, 4, 1).numpy()
        named = {"latents": latents, "timesteps": times, "text": text, "velocity": velocity}
        arrays |= {f"{name}_{key}": value for key, value in named.items()}
    np.savez_compressed(
        Path(__file__).with_name("wan_transformer.npz"),
        weights=np.concatenate([value.ravel() for value in weights.values()]),
        shapes=json.dumps({name: value.shape for name, value in weights.items()}),
        **arrays,
    )


if __name__ == "__main__":
    main()
