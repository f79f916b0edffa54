"""A whole transformer's forward, low-bit beside bfloat16, on this machine's first device.

    python benchmarks/model_speed.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers
    python benchmarks/model_speed.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --layers 4

Published sizes, random weights, one sample, everything a step of sampling computes but guidance's
second pass: norms, attention, rotary embeddings, the quantization of tokens. Of few layers the
ratio is that of a block; what is before and behind them is small. The calls take turns, so that a
busy machine slows all; a figure is the median of the repeats after one of warm-up. `--attention`
times the self-attention of one block alone, which low-bit linears do not make faster.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from load_memory import write_export

from convert.load import read_transformer
from kernels.attention import attention
from kernels.bench import device_name, versions
from qvgen_jax.models import TransformerConfig, abstract_params, text_only
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.plan.shapes import Run, video_and_text
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.training.teacher import as_held, teacher_definition
from qvgen_jax.transformer import Transformer

_SIZES = {"Wan": (81, 480, 832), "CogVideoX1.5": (81, 768, 1360), "CogVideoX": (49, 480, 720)}


def random_params(config: TransformerConfig, dtype: jnp.dtype) -> dict:
    """Normal numbers on the device, matrices in dtype."""

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(0), zlib.crc32(str(path).encode()))
        return jax.jit(lambda key: 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype))(key)

    like = jax.eval_shape(lambda x: as_held(x, dtype), abstract_params(config))
    return jax.tree_util.tree_map_with_path(draw, like)


def inputs_of(run: Run) -> tuple:
    """Latents, a timestep and a prompt, of one sample."""
    (frames, *rest), text = video_and_text(run)
    frames += -frames % run.model.patch_size[0]  # CogVideoX1.5's pipeline adds some in front.
    keys = jax.random.split(jax.random.key(1))
    return (
        jax.random.normal(keys[0], (1, frames, *rest), jnp.bfloat16),
        jnp.array([500.0]),
        jax.random.normal(keys[1], (1, *text), jnp.bfloat16),
    )


def packed(config: TransformerConfig, bits: int, kernels: str, folder: str) -> Transformer:
    """A packed export of random codes, loaded as any other."""
    quant = QuantConfig(bits, bits, rank=0, single_clip=text_only(config))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        write_export(Path(place), config, quant)
        transformer = read_transformer(Path(place), jnp.dtype("bfloat16"), kernels=kernels)
        return dataclasses.replace(transformer, states=jax.device_put(transformer.states))


def in_turns(calls: Mapping[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def attention_call(run: Run) -> Callable:
    """The self-attention of one block."""
    model = run.model
    shape = (1, run.block_tokens, model.num_attention_heads, model.attention_head_dim)
    q, k, v = (
        jax.random.normal(key, shape, jnp.bfloat16)
        for key in jax.random.split(jax.random.key(2), 3)
    )
    attend = jax.jit(attention)
    return lambda: attend(q, k, v)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=tuple(PUBLISHED), default=next(iter(PUBLISHED)))
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--bits", type=int, choices=(3, 4, 8), default=4)
    parser.add_argument("--kernels", nargs="+", default=["auto", "xla"])
    parser.add_argument("--attention", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="for the export")
    parser.add_argument("--out", type=Path, help="write JSON there too")
    asked = parser.parse_args()

    config = PUBLISHED[asked.model]
    config = dataclasses.replace(config, num_layers=asked.layers or config.num_layers)
    family = next(name for name in _SIZES if name in asked.model)
    size = dict(zip(("num_frames", "height", "width"), asked.size or _SIZES[family], strict=True))
    text_tokens = 512 if isinstance(config, WanConfig) else 226
    run = Run({"data": {**size, "max_length": text_tokens}}, config, (4, 8))
    inputs, dtype = inputs_of(run), jnp.dtype("bfloat16")
    networks = {
        "bfloat16": Transformer(
            config, teacher_definition(config, dtype), (random_params(config, dtype),)
        )
    }
    name = f"W{asked.bits}A{asked.bits}"
    for kernels in asked.kernels:
        networks[f"{name} {kernels}"] = packed(config, asked.bits, kernels, asked.folder)
    calls = {key: lambda net=net: net(*inputs) for key, net in networks.items()}
    if asked.attention:
        calls["self-attention, one block"] = attention_call(run)
    found = in_turns(calls, asked.repeats)
    weights = {
        key: sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(net.states))
        for key, net in networks.items()
    }
    kind = device_name()
    print(f"{asked.model}, {config.num_layers} layers, {run.tokens} tokens, {kind}")
    for key, milliseconds in found.items():
        line = f"  {key:28s}{milliseconds:10.2f} ms"
        if key in weights:
            line += f"  {found['bfloat16'] / milliseconds:5.2f}x bf16  {weights[key] / 1e9:6.2f} GB"
        print(line, flush=True)
    if asked.out:
        record = {
            "command": "python " + " ".join(sys.argv),
            "device": kind,
            "versions": versions(),
            "model": asked.model,
            "layers": config.num_layers,
            "tokens": run.tokens,
            "repeats": asked.repeats,
            "ms": found,
            "bytes": weights,
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
