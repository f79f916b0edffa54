"""The verdict on a student: the same prompts and noise through every variant, judged and paired."""

import hashlib
import json
import platform
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from qvgen_jax.components import fingerprint
from qvgen_jax.data.moving_shapes import Attributes, caption, held_out_prompts
from qvgen_jax.evaluation.intervals import paired_difference, wilson
from qvgen_jax.evaluation.judge import judge, plain, strict
from qvgen_jax.evaluation.reference import locked, reference_folder, save_arrays
from qvgen_jax.evaluation.samples import slug
from qvgen_jax.pipeline import Pipeline

REFERENCE = "Full precision"
_SCORES = ("plain", "strict", "shape", "colour", "direction")
_SLICE = 64  # Videos between two saves: an interrupted evaluation loses at most these.


def held_out(videos: int, seed: int) -> tuple[list[Attributes], list[int]]:
    """What is asked: `videos` held-out descriptions, cycled with a new seed each time round."""
    prompts = held_out_prompts()
    asked = [prompts[index % len(prompts)] for index in range(videos)]
    return asked, [seed + index for index in range(videos)]


def judge_all(videos: np.ndarray, asked: list[Attributes]) -> dict[str, np.ndarray]:
    """Booleans `[videos]` per score."""
    verdicts = [judge(video) for video in videos]
    pairs = list(zip(verdicts, asked, strict=True))
    return {
        "plain": np.array([plain(verdict, wanted) for verdict, wanted in pairs]),
        "strict": np.array([strict(verdict, wanted) for verdict, wanted in pairs]),
        "shape": np.array([verdict.shape == wanted.shape for verdict, wanted in pairs]),
        "colour": np.array([verdict.colour == wanted.colour for verdict, wanted in pairs]),
        "direction": np.array([verdict.direction == wanted.direction for verdict, wanted in pairs]),
    }


def score(pipe: Pipeline, asked: list[Attributes], seeds: list[int], batch_size: int) -> dict:
    """Judge one variant: the booleans of `judge_all`, `latents` `[videos, ...]` and `seconds`."""
    prompts = [caption(attributes) for attributes in asked]
    start = time.perf_counter()
    latents = pipe.sample_latents(prompts, seeds=seeds, batch_size=batch_size)
    frames = pipe.to_frames(latents, batch_size=batch_size)
    seconds = np.full(len(asked), (time.perf_counter() - start) / len(asked))
    return {**judge_all(frames, asked), "latents": latents, "seconds": seconds}


def score_in_slices(
    pipe: Pipeline, asked: list[Attributes], seeds: list[int], batch_size: int, folder: Path
) -> dict:
    """`score`, saved slice by slice under `folder`, so that it continues where it stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for start in range(0, len(asked), _SLICE):
        path = folder / f"{start:05d}.npz"
        if not path.is_file():
            part = slice(start, start + _SLICE)
            found = score(pipe, asked[part], seeds[part], batch_size)
            save_arrays(path, **found)
            print(f"{folder.name}: {min(start + _SLICE, len(asked))}/{len(asked)}", flush=True)
        parts.append(dict(np.load(path)))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _share(hits: np.ndarray) -> dict:
    interval = wilson(int(hits.sum()), len(hits))
    return {
        "count": int(hits.sum()),
        "total": len(hits),
        "interval": [round(interval.low, 4), round(interval.high, 4)],
    }


def row(name: str, found: dict, reference: dict) -> dict:
    """One line of the table: shares with intervals, and what differs from the reference.

    `strict_videos` has a character per video, 1 where it is strictly right, for paired comparisons
    between runs.
    """
    line = {"name": name, **{key: _share(found[key]) for key in _SCORES}}
    line["strict_videos"] = "".join("01"[int(hit)] for hit in found["strict"])
    # The first slice holds the compilation.
    seconds = found["seconds"][_SLICE:] if len(found["seconds"]) > _SLICE else found["seconds"]
    line["seconds_per_video"] = round(float(np.median(seconds)), 3)
    line["strict_difference"] = line["latent_difference"] = None
    if found is not reference:
        paired = paired_difference(found["strict"], reference["strict"])
        line["strict_difference"] = {
            "mean": round(paired.value, 4),
            "interval": [round(paired.low, 4), round(paired.high, 4)],
        }
        gap = np.linalg.norm(found["latents"] - reference["latents"])
        line["latent_difference"] = round(float(gap / np.linalg.norm(reference["latents"])), 4)
    return line


def made_by(pipe: Pipeline) -> str:
    """A digest of everything but prompt and seed that decides a pipeline's videos."""
    networks = fingerprint(pipe.transformer, pipe.vae, pipe.text_encoder)
    settings = f"{networks} {pipe.scheduler} {sorted(pipe.defaults.items())}"
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def evaluate_variants(config: Mapping, workdir: Path, variants: Mapping[str, Pipeline]) -> dict:
    """Judge all variants; the first must be the full-precision one.

    That one's verdicts are kept in `evaluate.reference`, which runs may share. Writes
    `evaluation.json` in the workdir and returns what it holds.
    """
    count, seed = config["evaluate"]["videos"], config["evaluate"]["seed"]
    asked, seeds = held_out(count, seed)
    batch_size = min(config["sample"]["batch_size"], count)
    rows, reference = [], None
    for name, pipe in variants.items():
        # Another model, or other settings, must not find this one's slices.
        asked_of = f"{slug(name)}-{count}-{seed}-{made_by(pipe)}"
        if reference is None:
            shared = reference_folder(config, workdir)
            with locked(shared):
                found = score_in_slices(pipe, asked, seeds, batch_size, shared / asked_of)
            reference = found
        else:
            folder = workdir / "evaluation" / asked_of
            found = score_in_slices(pipe, asked, seeds, batch_size, folder)
        rows.append(row(name, found, reference))
    defaults = next(iter(variants.values())).defaults
    result = {
        "videos": count,
        "prompts": "held out: (shape, colour, direction) triples that training never saw",
        "seed": seed,
        "steps": defaults["steps"],
        "guidance_scale": defaults["guidance_scale"],
        "variants": rows,
        "timing": (
            "Median over slices of 64 videos after the first, which compiles."
            if count > _SLICE
            else "Compilation is included: there are too few videos to leave it out."
        ),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    (workdir / "evaluation.json").write_text(json.dumps(result, indent=1))
    return result


def table(result: Mapping) -> str:
    """The judge's table as Markdown."""
    lines = [
        "| | plain | strict | strict, paired difference (95 %) | latents differ by |",
        "|---|---|---|---|---|",
    ]
    for line in result["variants"]:
        cells = [line["name"]]
        for key in ("plain", "strict"):
            share = line[key]
            low, high = (100 * end for end in share["interval"])
            percent = 100 * share["count"] / share["total"]
            cells.append(
                f"{percent:.1f} % ({share['count']}/{share['total']}, {low:.1f} to {high:.1f})"
            )
        paired = line["strict_difference"]
        if paired is None:
            cells += ["reference", "0"]
        else:
            low, high = (100 * end for end in paired["interval"])
            cells.append(f"{100 * paired['mean']:+.1f} points ({low:+.1f} to {high:+.1f})")
            cells.append(f"{line['latent_difference']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
