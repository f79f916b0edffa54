"""Every method without training on the tiny pipeline: time, size, and what the judge says.

    python benchmarks/untrained.py --videos 128        # what is not there yet; an hour of one core
    python benchmarks/untrained.py --speed             # how fast they sample, minutes
    python benchmarks/untrained.py --write docs/study.md

Each is a `--job quantize`; all of one bit-width are compared by one `--job evaluate`, in pairs of
videos from the same noise. For speed all sample the same batch in turns, so that a busy machine
slows all; a figure is the median after one turn of warm-up. Results are kept in
benchmarks/results/untrained.json.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import qvgen_jax
from configs import read_config
from kernels.bench import device_name
from qvgen_jax.evaluation.samples import read_prompts
from qvgen_jax.ptq.methods import METHODS
from qvgen_jax.study.grid import bits_name

RESULTS = Path(__file__).with_name("results") / "untrained.json"
BEGIN, END = "<!-- untrained: begin -->", "<!-- untrained: end -->"
CONFIG = "configs/tiny_w4a4.py"
BITS = ((4, 4), (3, 3), (4, 6), (4, 8), (8, 8))
NAMES = {
    "rtn": "Round to nearest",
    "rtn_search": "Searched ranges",
    "smoothquant": "SmoothQuant",
    "gptq": "GPTQ",
    "vidit_q": "ViDiT-Q",
    "svdquant": "SVDQuant",
}


def run(*arguments: str) -> None:
    """`python main.py --config CONFIG ...`; ends this program if it fails."""
    done = subprocess.run([sys.executable, "main.py", "--config", CONFIG, *arguments], check=False)
    if done.returncode:
        sys.exit(f"main.py {' '.join(arguments)} ended with exit code {done.returncode}")


def quantized(bits: tuple[int, int], scratch: Path) -> dict[str, Path]:
    """The folder of each method at one bit-width; what is there already the job knows."""
    folders = {method: scratch / f"{bits_name(bits)}_{method}" for method in METHODS}
    keys = (f"--config.quant.weight_bits={bits[0]}", f"--config.quant.act_bits={bits[1]}")
    for method, folder in folders.items():
        run("--job=quantize", f"--method={method}", f"--workdir={folder}", *keys)
    return folders


def sampling_seconds(bits: tuple[int, int], scratch: Path, repeats: int = 5) -> dict:
    """Seconds in which each makes the latents of a video, in a batch; and how large that is."""
    config = read_config(CONFIG)
    size = config.sample.batch_size
    prompts = read_prompts(config.sample.prompts, size)
    folders = {"full_precision": Path(config.model)}
    folders |= {m: folder / "export" for m, folder in quantized(bits, scratch).items()}
    # Prompts are encoded before the clock starts: for all alike.
    pipes = {n: qvgen_jax.load(f).with_encoded([*prompts, ""]) for n, f in folders.items()}
    taken: dict[str, list[float]] = {name: [] for name in pipes}
    for _ in range(repeats + 1):
        for name, pipe in pipes.items():
            began = time.perf_counter()
            pipe.sample_latents(prompts, seeds=list(range(size)), batch_size=size)
            taken[name].append((time.perf_counter() - began) / size)
    seconds = {name: statistics.median(times[1:]) for name, times in taken.items()}
    return {"batch_size": size, "repeats": repeats, "seconds": seconds}


def compared(bits: tuple[int, int], videos: int, scratch: Path) -> dict:
    """All methods at one bit-width, by method what the two jobs wrote down."""
    folders = quantized(bits, scratch)
    exports = [f"--export={NAMES[m]}={folder / 'export'}" for m, folder in folders.items()]
    keys = {"videos": videos, "shown": 0, "pixels": False, "round_to_nearest": False}
    keys |= {"reference": scratch / "reference"}
    asked = [f"--config.evaluate.{key}={value}" for key, value in keys.items()]
    judged = scratch / f"{bits_name(bits)}_judged"
    run("--job=evaluate", f"--workdir={judged}", *exports, *asked)
    rows = json.loads((judged / "evaluation.json").read_text())["variants"]
    found = {"full_precision": kept(rows[0])}
    for method, row in zip(METHODS, rows[1:], strict=True):
        made = json.loads((folders[method] / "quantize.json").read_text())
        found[method] = kept(row) | {
            "output_error": made["mean_output_error"],
            "seconds_to_quantize": sum((made["seconds"] | made["stage_seconds"]).values()),
            "linears_bytes": made["linears_bytes"],
        }
    return found


def kept(row: Mapping) -> dict:
    """Of a row of `evaluation.json` what tables and later questions need."""
    keys = ("plain", "strict", "strict_difference", "strict_videos", "latent_difference")
    return {key: row[key] for key in keys}


HEADS = (
    "strict",
    "paired difference, points",
    "latents differ by",
    "output error of a linear",
    "linears, MB",
    "seconds to quantize",
)
SPEED = "seconds to denoise, by full precision's"


def table(results: Mapping) -> str:
    """A Markdown table for each bit-width."""
    parts = []
    for width, rows in results["bits"].items():
        speed = results.get("speed", {}).get(width)
        heads = [*HEADS, *[SPEED] * bool(speed)]
        lines = [f"| {width.upper()} | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
        for name, row in rows.items():
            found = [NAMES.get(name, "Full precision"), cells(row)]
            if speed:
                found.append(ratio(speed["seconds"], name))
            lines.append(f"| {' | '.join(found)} |")
        if speed:
            lines.append(f"\nDenoised on {speed['device']}, jax {speed['jax']}.")
        parts.append("\n".join(lines))
    made = [f"{results['device']}, jax {results['jax']}."] if "device" in results else []
    return "\n\n".join([*parts, *made])


def ratio(seconds: Mapping[str, float], name: str) -> str:
    """Of one method's time to full precision's; nothing where it was not measured."""
    return f"{seconds[name] / seconds['full_precision']:.2f}" if name in seconds else ""


def cells(row: Mapping) -> str:
    """Of one method."""
    strict = row["strict"]
    found = [f"{strict['count']}/{strict['total']}"]
    if row["strict_difference"] is None:
        return " | ".join([*found, *["reference"] * 2, *[""] * 3])
    mean, (low, high) = (row["strict_difference"][key] for key in ("mean", "interval"))
    found.append(f"{100 * mean:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})")
    found.append(f"{row['latent_difference']:.3f}")
    found.append(f"{100 * row['output_error']:.1f} %")
    found.append(f"{sum(row['linears_bytes'].values()) / 1e6:.2f}")
    found.append(f"{row['seconds_to_quantize']:.0f}")
    return " | ".join(found)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--videos", type=int, default=128)
    parser.add_argument("--scratch", type=Path, default=Path("runs/untrained"))
    parser.add_argument("--write", type=Path, help="a Markdown file with the table's markers")
    parser.add_argument("--speed", action="store_true", help="measure that of W4A4 alone")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"bits": {}}
    if given.write:
        text = given.write.read_text()
        before, after = text.partition(BEGIN)[0], text.partition(END)[2]
        given.write.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
        return
    if given.speed:
        measured = sampling_seconds((4, 4), given.scratch)
        results["speed"] = {"w4a4": measured | {"device": device_name(), "jax": version("jax")}}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        return
    results |= {"jax": version("jax"), "device": device_name(), "videos": given.videos}
    for bits in BITS:
        if (name := bits_name(bits)) not in results["bits"]:
            results["bits"][name] = compared(bits, given.videos, given.scratch)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
