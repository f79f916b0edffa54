"""Runs that are killed, told to stop, or find damaged checkpoints: all end as if undisturbed?

    python benchmarks/faults.py --kills 200 --terms 50 --corruptions 100 --seed 0
    python benchmarks/faults.py --write docs/reliability.md  # the table, between the file's markers

A run is `main.py` on the tiny pipeline with one of its layers: 24 steps, a checkpoint after every
third, ranks 4, 2, 1 and 0, export and report. It is ended five times, at random moments or in the
middle of a save, at a boundary of phases, at export, and started again with the same command; then
it is left to end by itself. Its losses, its last checkpoint and its export must then be, bit by
bit, those of a run that nobody disturbed. What happened is kept in benchmarks/results/faults.json,
run by run: the same command goes on to the numbers that are asked for.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import IO

import jax
import numpy as np
import orbax.checkpoint as ocp
from safetensors.numpy import load_file, save_file

from kernels.bench import device_name
from qvgen_jax.errors import UserError
from qvgen_jax.quant.schedule import RankDecay, boundaries, phase_steps_for
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.pace import SPEED

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_name("results") / "faults.json"
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"
STEPS, RANK, PER_RUN = 24, 4, 5
BOUNDARIES = boundaries(RankDecay(phase_steps_for(STEPS, 0.5, RANK), RANK), STEPS)
MOMENTS = ("anywhere", "in a save", "at a boundary", "at export")
WEIGHTS = (6, 2, 1, 1)  # How often each is tried.
DAMAGES = ("cut short", "a bit flipped", "missing")
OVERRIDES = {
    "train.steps": STEPS,
    "train.batch_size": 2,
    "train.warmup_steps": 2,
    "train.log_every": 1,
    "train.log_spectrum": False,
    "train.checkpoint_every": 3,
    "train.keep_checkpoints": 3,
    "train.remat": "none",
    "quant.rank": RANK,
    "quant.decay_fraction": 0.5,
    "data.max_length": 16,
    "sample.count": 0,
    "evaluate.videos": 0,
}


def one_layer(folder: Path) -> None:
    """The tiny pipeline with the first of its layers alone."""
    shutil.copytree(ROOT / "assets/tiny_wan", folder)
    path = folder / "transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_layers": 1}))
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    kept = {k: v for k, v in load_file(path).items() if k[:7] != "blocks." or k[:9] == "blocks.0."}
    save_file(kept, path, metadata={"format": "pt"})


class Scene:
    """What all runs share: the model, the encoded clips, the compiled programs."""

    def __init__(self, folder: Path):
        self.folder = folder
        one_layer(folder / "model")
        cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        self._environment = {**os.environ, **cache, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
        self._log = (folder / "log.txt").open("a")

    def start(self, workdir: Path, out: IO | None = None) -> subprocess.Popen:
        """The run in `workdir`; it writes to the scene's log, or to `out`."""
        paths = {"model": self.folder / "model", "data.encoded": self.folder / "encoded"}
        flags = [f"--config.{key}={value}" for key, value in (OVERRIDES | paths).items()]
        command = ["main.py", "--config", "configs/tiny_w4a4.py", "--workdir", str(workdir), *flags]
        self._log.write(f"== {workdir.name}\n")
        self._log.flush()
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self._environment,
            stdout=out or self._log,
            stderr=out or self._log,
        )

    def undisturbed(self, name: str) -> float:
        """Seconds of a run to its end."""
        start = time.monotonic()
        if code := self.start(self.folder / name).wait():
            sys.exit(f"the undisturbed run ended with {code}; see {self.folder / 'log.txt'}")
        return time.monotonic() - start


def fingerprint(workdir: Path) -> dict:
    """What must be the same: losses, the last checkpoint's arrays, the exported files."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").open()]
    found = {"metrics": [{k: v for k, v in x.items() if k not in SPEED} for x in lines]}
    for path in sorted((workdir / "export").rglob("*.safetensors")):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(workdir))] = digest
    state = as_saved(workdir, STEPS)
    found["state"] = [hashlib.sha256(x.tobytes()).hexdigest() for x in jax.tree.leaves(state)]
    return found


def as_saved(workdir: Path, step: int) -> dict:
    """The arrays of a checkpoint, without checksums and without asking whether they are good."""
    with ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(workdir.resolve() / "checkpoints" / str(step) / "default")
    state.pop("checksums")
    return jax.tree.map(np.asarray, state)


def come(moment: str, workdir: Path, rng: random.Random, seconds: float) -> Callable[[], bool]:
    """Whether the moment has come, to be asked again and again."""
    if moment == "anywhere":
        at = time.monotonic() + rng.uniform(0, seconds)
        return lambda: time.monotonic() > at
    if moment == "in a save":
        seen, wanted = set(), rng.randint(1, 4)

        def saving() -> bool:
            seen.update(path.name for path in workdir.glob("checkpoints/*tmp*"))
            return len(seen) >= wanted

        return saving
    if moment == "at export":
        return lambda: any(workdir.glob("export*"))
    first, wait = last_step(workdir), rng.uniform(0, 0.2)
    ahead = [step for step in BOUNDARIES if step > first + 1]
    at = rng.choice(ahead) if ahead else STEPS

    def entered() -> bool:
        if last_step(workdir) < at - 1:
            return False
        time.sleep(wait)
        return True

    return entered


def last_step(workdir: Path) -> int:
    """The last one logged; -1 before the first."""
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") - 1 if path.is_file() else -1


def nothing_yet() -> dict:
    """Counts of `end_runs` before the first run."""
    return {"ended": {}, "runs": 0, "lost": 0, "different": 0, "exit_codes": {}}


def end_runs(
    scene: Scene,
    number: signal.Signals,
    so_far: dict,
    seed: int,
    whole: dict,
    seconds: float,
    times: int = PER_RUN,
) -> None:
    """End one more run so many times, compare its end with `whole`, and count it in `so_far`."""
    rng = random.Random(f"{number.name} {seed} {so_far['runs']}")
    workdir = scene.folder / f"{number.name}-{so_far['runs']}"
    for _ in range(times):
        moment = rng.choices(MOMENTS, WEIGHTS)[0]
        process = scene.start(workdir)
        reached = come(moment, workdir, rng, seconds)
        while process.poll() is None and not reached():
            time.sleep(0.002)
        if process.poll() is not None:  # The moment was behind it, or never came.
            break
        process.send_signal(number)
        code = str(process.wait())
        so_far["exit_codes"][code] = so_far["exit_codes"].get(code, 0) + 1
        so_far["ended"][moment] = so_far["ended"].get(moment, 0) + 1
    so_far["runs"] += 1
    if scene.start(workdir).wait():
        so_far["lost"] += 1
    elif fingerprint(workdir) != whole:
        so_far["different"] += 1
    else:
        shutil.rmtree(workdir)  # What went wrong stays, for a look.
    print(number.name, json.dumps(so_far), flush=True)


def damage(path: Path, how: str, rng: random.Random) -> None:
    """Make a file what a disk or a cut transfer may make of it."""
    content = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "cut short":
        path.write_bytes(content[: rng.randrange(len(content))])
    else:
        place = rng.randrange(8 * len(content))
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)


def damage_checkpoints(whole: Path, scratch: Path, count: int, seed: int) -> dict:
    """Damage one file of the newest checkpoint, or of all; what `Checkpoints.newest` then gives."""
    keep = OVERRIDES["train.keep_checkpoints"]
    with Checkpoints(whole, keep) as checkpoints:
        saved = {step: as_saved(whole, step) for step in checkpoints.steps()}

    def like(step: int) -> dict:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), saved[step])

    found = {how: Counter() for how in DAMAGES}
    rng = random.Random(f"corruptions {seed}")
    for _, how in zip(range(count), itertools.cycle(DAMAGES), strict=False):
        workdir = scratch / "damaged"
        shutil.copytree(whole / "checkpoints", workdir / "checkpoints")
        steps = sorted(saved) if rng.random() < 0.2 else sorted(saved)[-1:]
        for step in steps:
            folder = workdir / "checkpoints" / str(step)
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            damage(rng.choice([path for path in files if path.stat().st_size]), how, rng)
        found[how][after_damage(workdir, keep, like, saved)] += 1
        shutil.rmtree(workdir)
    return {how: dict(outcomes) for how, outcomes in found.items()}


def after_damage(workdir: Path, keep: int, like: Callable, saved: dict) -> str:
    """What a run that starts there would go on from."""
    try:
        with Checkpoints(workdir, keep) as checkpoints:
            state = checkpoints.newest(like)
    except UserError:
        return "refused"
    if state is None:
        return "silent"
    step = int(state["step"])
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(saved[step]), strict=True)
    if any(np.asarray(a).tobytes() != b.tobytes() for a, b in pairs):
        return "silent"
    return "the newest, unharmed" if step == max(saved) else "one before"


def table(results: dict) -> str:
    """Markdown of what happened."""
    rows = ["| what | times | runs | lost | ended otherwise |", "|---|---|---|---|---|"]
    for name, result in results["signals"].items():
        told = ", ".join(f"{result['ended'].get(moment, 0)} {moment}" for moment in MOMENTS)
        times = sum(result["ended"].values())
        rows.append(
            f"| {name} ({told}) | {times} | {result['runs']} | {result['lost']} | "
            f"{result['different']} |"
        )
    rows += ["", "| one file of a checkpoint is | " + " | ".join(OUTCOMES) + " |"]
    rows.append("|---|" + "---|" * len(OUTCOMES))
    for how, outcomes in results["corruptions"].items():
        cells = " | ".join(str(outcomes.get(outcome, 0)) for outcome in OUTCOMES)
        rows.append(f"| {how} | {cells} |")
    told = f"{results['device']}, jax {results['jax']}, seed {results['seed']}"
    return "\n".join([*rows, "", f"{told}, {results['hours']:.1f} hours."])


OUTCOMES = ("one before", "the newest, unharmed", "refused", "silent")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=0, help="by SIGKILL")
    parser.add_argument("--terms", type=int, default=0, help="by SIGTERM")
    parser.add_argument("--corruptions", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's markers")
    given = parser.parse_args()
    if given.write:
        text = given.write.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        made = table(json.loads(given.results.read_text()))
        given.write.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")
        return
    results = {"signals": {}, "corruptions": {}, "seed": given.seed, "hours": 0.0}
    if given.results.is_file():
        results = json.loads(given.results.read_text())
    results |= {"device": device_name(), "jax": jax.__version__}
    folder = Path(tempfile.mkdtemp(prefix="qvgen-faults-"))
    campaign(folder, given, results)
    print(table(results))
    bad = [r["lost"] + r["different"] for r in results["signals"].values()]
    bad += [outcomes.get("silent", 0) for outcomes in results["corruptions"].values()]
    if any(bad):
        sys.exit(f"not all ended as they should have; see {folder}")
    shutil.rmtree(folder)


def campaign(folder: Path, given: argparse.Namespace, results: dict) -> None:
    """All that is missing, in a folder of its own; `results` are written after every run."""
    start, hours = time.monotonic(), results["hours"]

    def write() -> None:
        results["hours"] = hours + (time.monotonic() - start) / 3600
        given.results.write_text(json.dumps(results, indent=1) + "\n")

    scene = Scene(folder)
    scene.undisturbed("compiling")
    seconds = scene.undisturbed("whole")
    whole = fingerprint(folder / "whole")
    print(f"an undisturbed run: {seconds:.0f} s", flush=True)
    for number, count in ((signal.SIGKILL, given.kills), (signal.SIGTERM, given.terms)):
        so_far = results["signals"].setdefault(number.name, nothing_yet())
        while sum(so_far["ended"].values()) < count:
            end_runs(scene, number, so_far, given.seed, whole, seconds)
            write()
    if given.corruptions:
        damaged = damage_checkpoints(folder / "whole", folder, given.corruptions, given.seed)
        results["corruptions"] = damaged
        write()


if __name__ == "__main__":
    main()
