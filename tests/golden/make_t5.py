"""Makes t5.npz and umt5.npz: what transformers' encoders say of two prompts, and their weights.

CogVideoX's pipeline gives T5 no mask: its padding is attended.
Run: python tests/golden/make_t5.py (needs torch).
"""

import json
from pathlib import Path

import numpy as np
import torch
from tiny_models import T5
from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel


def make(file: str, model: torch.nn.Module, masked: bool) -> None:
    rng = np.random.default_rng(0)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "encoder.embed_tokens.weight":  # shared.weight under its other name
            continue
        spread = tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2
        values = spread * rng.standard_normal(tuple(tensor.shape))
        weights[name] = (values + name.endswith("norm.weight")).astype(np.float16)
    state = {k: torch.from_numpy(v.astype(np.float32)) for k, v in weights.items()}
    model.load_state_dict(state | {"encoder.embed_tokens.weight": state["shared.weight"]})
    ids = rng.integers(3, T5["vocab_size"], (2, 16)).astype(np.int32)
    mask = (np.arange(16) < np.array([[5], [16]])).astype(np.int32)
    ids = np.where(mask, ids, 0)
    if not masked:
        mask = np.ones_like(mask)  # what no mask means
    with torch.no_grad():
        given = torch.from_numpy(mask) if masked else None
        embeds = model(torch.from_numpy(ids), given).last_hidden_state.numpy()
    np.savez_compressed(
        Path(__file__).with_name(file),
        ids=ids,
        mask=mask,
        embeds=embeds,
        weights=np.concatenate([value.ravel() for value in weights.values()]),
        shapes=json.dumps({name: value.shape for name, value in weights.items()}),
    )


def main() -> None:
    t5 = T5Config(**T5)
    make("t5.npz", T5EncoderModel(t5).eval(), masked=False)
    make("umt5.npz", UMT5EncoderModel(UMT5Config(**T5)).eval(), masked=True)


if __name__ == "__main__":
    main()
