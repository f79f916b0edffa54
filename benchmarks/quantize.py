"""What quantization without training takes: whole blocks of a published model, random weights.

    python benchmarks/quantize.py --methods svdquant gptq --rows 128 --latents 1 16 16 \
        --json benchmarks/results/quantize_wan1_3b.json
    python benchmarks/quantize.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --dtype bfloat16 \
        --latents 13 60 104 --samples 2 --rows 2048

A transformer of the model's sizes with a few blocks goes through the engine of `--job quantize`,
every method in a process of its own. The first block compiles; what the others take is multiplied
up to the model's number, and marked as computed, not measured. `core_seconds` are those that cores
were at work, whoever else wanted them. Sampling the calibration inputs is
not part of it: that is the model's forward, so many times. docs/quantize.md holds the results.
"""

import argparse
import dataclasses
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from convert.packed import packed_definition
from qvgen_jax.models import TransformerConfig, abstract_params
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.ptq.engine import Done, Plan, quantize_stages
from qvgen_jax.ptq.methods import METHODS, quantization
from qvgen_jax.ptq.report import bytes_by_kind, peak_memory
from qvgen_jax.ptq.stages import in_batches
from qvgen_jax.quant.config import QuantConfig

_TEXT_TOKENS = 512


def random_params(model: TransformerConfig, dtype: jnp.dtype) -> dict:
    """Host arrays; kernels of a trained one's size, in the compute type."""
    rng = np.random.Generator(np.random.SFC64(0))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        matrix = path[-1].key == "kernel"
        size = leaf.shape[-2] ** -0.5 if matrix else 0.1
        drawn = rng.standard_normal(leaf.shape, np.float32) * np.float32(size)
        return drawn.astype(dtype if matrix else np.float32)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(model))


def random_inputs(model: TransformerConfig, samples: int, size: Sequence[int]) -> list[np.ndarray]:
    """Latents of `size` frames, height and width, timesteps and text."""
    rng = np.random.default_rng(0)
    text_dim = model.text_dim if isinstance(model, WanConfig) else model.text_embed_dim
    latents = rng.standard_normal((samples, *size, model.in_channels))
    text = rng.standard_normal((samples, _TEXT_TOKENS, text_dim))
    arrays = latents, np.linspace(950, 50, samples), text
    return [array.astype(np.float32) for array in arrays]


def measure(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One method over the blocks that were asked for."""
    whole, dtype = PUBLISHED[options.model], jnp.dtype(options.dtype)
    model = dataclasses.replace(whole, num_layers=options.blocks)
    params = random_params(model, dtype)
    batches = in_batches(random_inputs(model, options.samples, options.latents), 1)
    choices = METHODS[method]
    quant = quantization(QuantConfig(*options.bits), choices)
    before = peak_memory()["peak_host_bytes"]
    plan = Plan(model, quant, choices, dtype, options.rows, 0, packed_definition)
    start, done, cores, then = time.perf_counter(), [], [], time.process_time()
    for each in quantize_stages(plan, params, batches):
        done.append(each)
        cores.append(time.process_time() - then)
        then = time.process_time()
        told = {key: round(value, 1) for key, value in each.seconds.items()}
        print(f"{method}: {each.stage}, {told}", file=sys.stderr, flush=True)
    return {
        "method": method,
        "seconds": round(time.perf_counter() - start, 1),
        "stages": [_stage(*pair) for pair in zip(done, cores, strict=True)],
        "host_bytes_before": before,
        **peak_memory(),
        "computed_not_measured": _whole_model(done, cores, whole.num_layers),
    }


def _stage(done: Done, cores: float) -> dict[str, Any]:
    outputs = [each["output"] for each in done.errors.values()]
    return {
        "stage": str(done.stage),
        "seconds": {key: round(value, 2) for key, value in done.seconds.items()},
        "core_seconds": round(cores, 2),
        "mean_output_error": round(float(np.mean(outputs)), 4),
        "linears_bytes": bytes_by_kind(done.tensors.values()),
    }


def _whole_model(done: Sequence[Done], cores: Sequence[float], layers: int) -> dict[str, Any]:
    """Time and bytes of all blocks, if each takes what the last one here did."""

    def minutes(seconds: Sequence[float]) -> float:
        embed, first, *_, last, head = seconds
        return round((embed + first + (layers - 1) * last + head) / 60, 1)

    ends = bytes_by_kind([*done[0].tensors.values(), *done[-1].tensors.values()])
    one = bytes_by_kind(done[-2].tensors.values())
    return {
        "blocks": layers,
        "minutes": minutes([sum(each.seconds.values()) for each in done]),
        "core_minutes": minutes(cores),
        "linears_bytes": {kind: ends[kind] + layers * one[kind] for kind in ends},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=PUBLISHED, default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["gptq", "svdquant"])
    parser.add_argument("--blocks", type=int, default=2, help="two at least")
    parser.add_argument("--bits", type=int, nargs=2, default=[4, 4])
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--latents", type=int, nargs=3, default=[3, 20, 20])
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.blocks < 2:
        parser.error(f"--blocks {options.blocks}; expected 2 at least: the first one compiles")
    if options.one:
        print(json.dumps(measure(options.one, options)))
        return
    results = []
    for method in options.methods:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", method]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "one")}
    told = {
        "asked": asked,
        "text_tokens": _TEXT_TOKENS,
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}",
        "jax": jax.__version__,
        "methods": results,
    }
    text = json.dumps(told, indent=1) + "\n"
    if options.json:
        options.json.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
