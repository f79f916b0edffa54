"""What asynchronous checkpoints cost a run: steps with a save among them beside steps without.

    python benchmarks/checkpointing.py configs/tiny_w4a4.py --rounds 5

Rounds of `train.checkpoint_every` steps alternate, without a save and with one in their middle, as
a run has one per so many steps; both kinds end when the devices and the disk are done. Prints the
ratio of each pair and how long the call to save kept the loop waiting.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from train_step import DrawnClips

from configs import read_config
from kernels.bench import device_name, versions
from qvgen_jax.plan.shapes import read_run, video_and_text
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.feed import feed
from qvgen_jax.training.loop import compile_step, make_recipe, undrawn_state
from qvgen_jax.training.run import load_model
from qvgen_jax.training.teacher import held_in_training


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="of a model that is here, such as configs/tiny_w4a4.py")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write JSON there too")
    asked = parser.parse_args()

    config = read_config(asked.config).to_dict()
    every = config["train"]["checkpoint_every"]
    pipe = load_model(config)
    model, teacher = pipe.transformer.config, pipe.transformer.states[0]
    state = undrawn_state(config, model, teacher)
    teacher = held_in_training(config, model, teacher)
    clips = DrawnClips(*video_and_text(read_run(config)))
    empty_text, seed = jnp.asarray(clips.empty_text_embeds), jnp.int32(config["seed"])
    step = compile_step(make_recipe(config, model, pipe.scheduler, branch=True))
    data = feed(clips, config)
    state, _ = step(state, next(data), teacher, empty_text, seed)
    rows = []
    with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=2) as checkpoints:
        checkpoints.save(state)  # The first makes the folder and compiles the checksums.
        for _ in range(asked.rounds):
            row = {}
            for saving in (False, True):
                checkpoints.finish()
                start, waited = time.perf_counter(), 0.0
                for index in range(every):
                    state, metrics = step(state, next(data), teacher, empty_text, seed)
                    if saving and index == every // 2:
                        jax.block_until_ready(state)  # Or the save would seem to take the step.
                        called = time.perf_counter()
                        checkpoints.save(state)
                        waited = time.perf_counter() - called
                jax.block_until_ready((state, metrics))
                checkpoints.finish()
                row["with" if saving else "without"] = time.perf_counter() - start
            rows.append({**row, "ratio": row["with"] / row["without"], "waited": waited})
            print(", ".join(f"{key} {value:.3f}" for key, value in rows[-1].items()), flush=True)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    ratio, waited = (statistics.median(row[key] for row in rows) for key in ("ratio", "waited"))
    print(
        f"{asked.config}, a save of {size / 1e6:.1f} MB every {every} steps, {device_name()}: "
        f"{100 * (ratio - 1):.1f} % (median of {len(rows)}), {waited:.2f} s of waiting"
    )
    if asked.out:
        record = {"config": asked.config, "device": device_name(), "versions": versions()}
        record |= {"every": every, "bytes": size, "rounds": rows}
        asked.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
