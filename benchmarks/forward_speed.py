"""The transformer's forward at Wan-1.3B block dimensions: ours against diffusers, side by side.

    pip install -c constraints.txt -e '.[parity]'
    python benchmarks/forward_speed.py [--layers 2] [--frames 1 3] [--repeats 5]

Two blocks of the real width with random weights, the same latents, text and timestep through both,
at 480 x 832 pixels. The implementations take turns, so that a busy machine slows both; a figure is
the median of the repeats, a ratio is the median of the ratios of neighbouring turns.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from convert import wan_transformer
from convert.names import from_torch
from qvgen_jax.models.wan import WanConfig, WanTransformer
from qvgen_jax.transformer import Transformer

WIDTH = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960}
LATENTS = (60, 104)  # 480 x 832 pixels
TEXT_TOKENS = 512


def build(layers: int) -> tuple[diffusers.WanTransformer3DModel, WanConfig, dict]:
    """diffusers' model with random weights, and the same weights as our dict."""
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(**WIDTH, num_layers=layers).eval()
    config = WanConfig(**WIDTH, num_layers=layers)
    tensors = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    return theirs, config, from_torch(wan_transformer.name_table(config), tensors)


def ours(config: WanConfig, params: dict, dtype: jnp.dtype, inputs: tuple) -> Callable[[], object]:
    """A call of our transformer that waits for its result."""
    model = nnx.eval_shape(
        lambda: WanTransformer(config, key=jax.random.key(0), dtype=dtype, remat="none")
    )
    held = jax.tree.map(lambda x: jnp.asarray(x, dtype if x.ndim > 2 else jnp.float32), params)
    transformer = Transformer(config, nnx.split(model)[0], (held,))
    arrays = [jnp.asarray(x) for x in inputs]
    arrays[2] = arrays[2].astype(dtype)
    return lambda: np.asarray(transformer(*arrays))


def diffusers_call(
    model: diffusers.WanTransformer3DModel, dtype: torch.dtype, inputs: tuple
) -> Callable[[], object]:
    """The same call of diffusers' transformer, held in `dtype`."""
    import copy

    held = copy.deepcopy(model).to(dtype)
    latents, timesteps, text = (torch.from_numpy(x) for x in inputs)
    latents = latents.permute(0, 4, 1, 2, 3).contiguous().to(dtype)

    def call() -> object:
        with torch.inference_mode():
            return held(latents, timesteps, text.to(dtype), return_dict=False)[0].float().numpy()

    return call


def measure(calls: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, taken in turns; each is called once before to compile and warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 3], help="latent frames")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    theirs, config, params = build(arguments.layers)
    print(
        f"Wan-1.3B width, {arguments.layers} blocks, {os.cpu_count()} CPU cores, Python "
        f"{platform.python_version()}, jax {jax.__version__}, torch {torch.__version__}, "
        f"diffusers {diffusers.__version__}\n"
    )
    print("| tokens | type | diffusers, s | ours, s | diffusers / ours |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for frames in arguments.frames:
        latents = rng.standard_normal((1, frames, *LATENTS, 16)).astype(np.float32)
        text = rng.standard_normal((1, TEXT_TOKENS, config.text_dim)).astype(np.float32)
        inputs = (latents, np.array([500.0], np.float32), text)
        for name, kind in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
            calls = {
                "diffusers": diffusers_call(theirs, kind, inputs),
                "ours": ours(config, params, jnp.dtype(name), inputs),
            }
            found = measure(calls, arguments.repeats)
            pairs = zip(found["diffusers"], found["ours"], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
            a, b = (statistics.median(found[key]) for key in ("diffusers", "ours"))
            tokens = frames * LATENTS[0] * LATENTS[1] // 4
            print(f"| {tokens} | {name} | {a:.2f} | {b:.2f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
