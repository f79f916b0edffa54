"""Makes cogvideox_transformer.npz: diffusers' CogVideoXTransformer3DModel in its three variants.

Run: python tests/golden/make_cogvideox_transformer.py (needs torch and diffusers).
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from tiny_models import COGVIDEOX_MODELS

INPUTS = {  # latents [b, f, h, w, c] with f in temporal patches, timesteps, text tokens
    "video": ((2, 3, 4, 6, 2), (999.0, 437.0), 3),
    "image": ((1, 1, 6, 2, 2), (0.0,), 1),
}


def random_weights(model: torch.nn.Module, rng: np.random.Generator) -> dict[str, np.ndarray]:
    weights = {}
    for name, tensor in model.state_dict().items():
        spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
        values = spread * rng.standard_normal(tuple(tensor.shape))
        is_scale = tensor.ndim == 1 and name.endswith("weight")
        weights[name] = (values + is_scale).astype(np.float16)
    return weights


def rotary(model: torch.nn.Module, frames: int, height: int, width: int) -> tuple | None:
    """What the pipeline hands over for latents of this size."""
    if not model.config.use_rotary_positional_embeddings:
        return None
    pipeline = SimpleNamespace(transformer=model, vae_scale_factor_spatial=8)
    prepare = CogVideoXPipeline._prepare_rotary_positional_embeddings
    return prepare(pipeline, 8 * height, 8 * width, frames, torch.device("cpu"))


def main() -> None:
    rng = np.random.default_rng(0)
    arrays = {}
    for variant, fields in COGVIDEOX_MODELS.items():
        weights = random_weights(CogVideoXTransformer3DModel(**fields), rng)
        shapes = {name: value.shape for name, value in weights.items()}
        arrays[f"{variant}_shapes"] = json.dumps(shapes)
        arrays[f"{variant}_weights"] = np.concatenate([v.ravel() for v in weights.values()])
        state = {k: torch.from_numpy(v.astype(np.float32)) for k, v in weights.items()}
        for name, ((b, f, h, w, c), timesteps, tokens) in INPUTS.items():
            # The table of the 2B has room for text of one length only.
            model = CogVideoXTransformer3DModel(**fields, max_text_seq_length=tokens)
            model.eval().load_state_dict(state)
            f *= fields.get("patch_size_t", 1)
            latents = rng.standard_normal((b, f, h, w, c)).astype(np.float32)
            text = rng.standard_normal((b, tokens, fields["text_embed_dim"])).astype(np.float32)
            times = np.array(timesteps, np.float32)
            with torch.no_grad():
                out = model(
                    torch.from_numpy(latents).permute(0, 1, 4, 2, 3),
                    torch.from_numpy(text),
                    torch.from_numpy(times),
                    image_rotary_emb=rotary(model, f, h, w),
                ).sample
            v = out.permute(0, 1, 3, 4, 2).numpy()
            named = {"latents": latents, "timesteps": times, "text": text, "v": v}
            arrays |= {f"{variant}_{name}_{key}": value for key, value in named.items()}
    np.savez_compressed(Path(__file__).with_name("cogvideox_transformer.npz"), **arrays)


if __name__ == "__main__":
    main()
