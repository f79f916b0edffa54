"""Real optimization steps of a published model at its real width, with random weights and clips.

    python benchmarks/train_step.py configs/wan1_3b_w4a4.py
    python benchmarks/train_step.py configs/wan1_3b_w4a4.py --layers 8 --size 5 480 832 --steps 1

Everything is the run's own: initial scales and SVDs of every layer, student with its branch,
teacher, gradients, optimizer, one device. Only weights, latents and prompts are drawn, and what
smoothing measures is taken as 1. Prints what starting takes, each step's seconds, loss and gradient
norm, the memory at its peak, and MFU.
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from model_speed import random_params

from configs import read_config
from kernels.bench import device_name, versions
from qvgen_jax.data.clips import Size
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.plan.shapes import Run, scheduler_of, video_and_text
from qvgen_jax.training.feed import feed
from qvgen_jax.training.loop import compile_step, make_recipe, undrawn_state
from qvgen_jax.training.pace import work_of
from qvgen_jax.training.teacher import held_in_training


class DrawnClips:
    """Clips of normal numbers with the shapes of a config, as `EncodedDataset` gives them."""

    def __init__(self, latents: tuple[int, ...], text: tuple[int, int]):
        self._latents, self._text = latents, text
        self.max_length = text[0]
        self.empty_text_embeds = np.zeros(text, np.float32)
        self.buckets = {Size(*latents[:3]): range(len(self))}

    def __len__(self) -> int:
        return 1024

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(index))
        return {
            "latent_mean": rng.standard_normal(self._latents, np.float32),
            "latent_logvar": np.full(self._latents, -2.0, np.float32),
            "text_embeds": rng.standard_normal(self._text, np.float32),
            "caption": "drawn",
        }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of a published model, such as configs/wan1_3b_w4a4.py")
    parser.add_argument("--layers", type=int, help="instead of all")
    parser.add_argument("--size", type=int, nargs=3, metavar=("FRAMES", "HEIGHT", "WIDTH"))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--remat", help="another policy than the config's")
    parser.add_argument("--bare", action="store_true", help="without rotation and smoothing")
    parser.add_argument("--out", type=Path, help="write JSON there too")
    asked = parser.parse_args()

    config = read_config(asked.config).to_dict()
    config["train"] |= {"batch_size": asked.batch, "accumulate": 1}
    config["train"]["remat"] = asked.remat or config["train"]["remat"]
    if asked.bare:
        config["quant"] |= {"rotation": "none", "smoothing": 0.0}
    if asked.size:
        config["data"] |= dict(zip(("num_frames", "height", "width"), asked.size, strict=True))
    model = PUBLISHED[config["model"]]
    model = dataclasses.replace(model, num_layers=asked.layers or model.num_layers)
    run, dtype = Run(config, model, (4, 8)), jnp.dtype(config["compute_dtype"])
    latents, text = video_and_text(run)
    clips = DrawnClips(latents, text)

    device, start = jax.devices()[0], time.perf_counter()
    kind = device_name()
    print(
        f"{config['model']}, {model.num_layers} layers, {run.tokens} tokens x {asked.batch}, {kind}"
    )
    drawn = random_params(model, dtype)
    teacher = jax.block_until_ready(jax.tree.map(lambda x: x.astype(jnp.float32), drawn))
    del drawn
    began = time.perf_counter()
    state = jax.block_until_ready(undrawn_state(config, model, teacher))
    created = time.perf_counter() - began
    print(f"scales, branch and optimizer state: {created:.1f} s", flush=True)
    teacher = held_in_training(config, model, teacher)
    recipe = make_recipe(config, model, scheduler_of(model), branch=config["quant"]["rank"] > 0)
    empty_text, seed = jnp.asarray(clips.empty_text_embeds), jnp.int32(config["seed"])
    data, step = feed(clips, config), compile_step(recipe)
    work, rows = work_of(config, model, latents), []
    for index in range(asked.steps):
        batch = next(data)
        began = time.perf_counter()
        state, metrics = step(state, batch, teacher, empty_text, seed)
        jax.block_until_ready((state, metrics))
        seconds = time.perf_counter() - began
        scalars = {name: float(value) for name, value in metrics.items() if not value.ndim}
        row = {"step": index, "seconds": seconds, **scalars}
        row["tokens_per_second"] = work.tokens / seconds
        if work.peak:
            row["mfu"] = work.operations / seconds / work.peak
        rows.append(row)
        told = ", ".join(f"{key} {value:.5g}" for key, value in row.items())
        print(told + (" (with compiling)" if index == 0 else ""), flush=True)
    memory = device.memory_stats() or {}
    if "peak_bytes_in_use" in memory:
        print(f"peak of device memory: {memory['peak_bytes_in_use'] / 1e9:.2f} GB")
    print(f"whole: {time.perf_counter() - start:.0f} s")
    if asked.out:
        record = {
            "command": "python " + " ".join(sys.argv),
            "device": kind,
            "versions": versions(),
            "tokens": run.tokens,
            "batch": asked.batch,
            "layers": model.num_layers,
            "seconds_to_create_the_state": created,
            "peak_bytes": memory.get("peak_bytes_in_use"),
            "steps": rows,
        }
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
