"""The student while it trains: held-out predictions, layer by layer, and its videos.

The student is asked as it stands while it has a branch, then as it would ship. The teacher is asked
once, before the first step, and its answers are kept.
"""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from qvgen_jax.data.video import write_video
from qvgen_jax.evaluation.drift import (
    compare_latents,
    final_latents,
    held_out_comparison,
    teachers_answer,
)
from qvgen_jax.evaluation.evaluate import made_by
from qvgen_jax.evaluation.samples import read_prompts
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.low_rank import merge_adapters
from qvgen_jax.quant.measure import measure_layers
from qvgen_jax.training.student import quant_config
from qvgen_jax.training.validation import FOLDER, Validated
from qvgen_jax.transformer import Transformer

_DIGITS = 6  # Of the numbers in a row; float32 has seven.

LayerNames = Callable[[TransformerConfig, QuantConfig], dict[str, list[str]]]
"""Of every quantized layer of the parameters, the names that its stack has in an export."""


def validation(
    config: Mapping, workdir: Path, teacher: Pipeline, names_of: LayerNames
) -> Callable[[int, Transformer], Validated]:
    """The function that validates a student at a step; the teacher is asked now.

    Args:
        config: reads `train.validate_videos` (0 for none), `evaluate.held_out` and `reference`,
            `quant`, and `sample.prompts`, `seed` and `batch_size`.
        workdir: of the run.
        teacher: the full-precision pipeline.
        names_of: `convert.packed.layer_names`.
    """
    model = teacher.transformer.config
    quant = quant_config(config["quant"], model)
    compare, shown = held_out_comparison(config, workdir, teacher), None
    if config["train"]["validate_videos"]:
        shown = _prepare_videos(config, workdir, teacher)
    names, quantized = names_of(model, quant), quant.quantized(quantizable(model))

    def validate(step: int, student: Transformer) -> Validated:
        start = time.perf_counter()
        held_out, drift, videos = compare(student), None, []
        if shown is not None:
            drift, videos = _film(shown, workdir, step, student)
        params, levels, gate = *student.states, student.gate
        if quant.merged:  # What its quantizers see.
            params, gate = merge_adapters(params), None
        found = measure_layers(params, levels, quantized, gate)
        layers = {
            name: row
            for kind in quantized
            for name, row in zip(names[kind], found[kind], strict=True)
        }
        record = {
            **{name: held_out[name] for name in ("timesteps", "cosine", "relative", "normalised")},
            "drift": drift,
            "layers": layers,
            "videos": videos,
        }
        scalars = {
            "held_out_loss": held_out["mean"]["normalised"],
            **_telling(held_out, drift, layers),
            "validation_seconds": round(time.perf_counter() - start, 2),
        }
        return Validated(scalars, _plain(record), teacher.defaults["fps"])

    return validate


def _telling(held_out: Mapping, drift: Mapping | None, layers: Mapping[str, Mapping]) -> dict:
    """The scalars that go to the log, in short for all layers; without what is no number."""
    errors = [row["weight_error"] for row in layers.values()]
    branches = [row["branch_norm"] for row in layers.values() if row["branch_norm"] is not None]
    scalars = {f"held_out_{name}": held_out["mean"][name] for name in ("cosine", "relative")}
    if drift is not None:
        scalars |= {"drift": drift["relative"], "drift_motion": drift["motion"]}
    if errors:
        scalars["weight_error"] = float(np.mean(errors))
        scalars["weight_error_worst"] = float(np.max(errors))
    if branches:
        scalars["branch_norm"] = float(np.mean(branches))
    return {name: value for name, value in scalars.items() if math.isfinite(value)}


class _Videos(NamedTuple):
    """What both networks film.

    Attributes:
        pipe: the teacher's, with its prompts encoded; its transformer is never asked again.
        asked: `prompts` and `seeds`.
        latents: the teacher's final ones.
        rows: `prompt`, `seed` and the `teacher`'s file of each video.
        defaults: the teacher's.
        batch_size: videos at once.
    """

    pipe: Pipeline
    asked: Mapping[str, np.ndarray]
    latents: np.ndarray
    rows: list[dict]
    defaults: Mapping[str, Any]
    batch_size: int


def _prepare_videos(config: Mapping, workdir: Path, teacher: Pipeline) -> _Videos:
    """Films the teacher, unless its files are there."""
    prompts = read_prompts(config["sample"]["prompts"], config["train"]["validate_videos"])
    # Those of the report's pairs: its student is the last of this series.
    seeds = config["sample"]["seed"] + np.arange(len(prompts))
    size = min(config["sample"]["batch_size"], len(prompts))
    # Encoded now: later the devices are full of the training state.
    pipe = teacher.with_encoded([*prompts, ""])
    asked = {"prompts": np.array(prompts), "seeds": seeds}
    how = {"defaults": teacher.defaults, "batch_size": size}
    answer = partial(final_latents, **how)
    latents = teachers_answer(config, workdir, pipe, "validation", asked, answer)
    made, rows = made_by(teacher), []
    for prompt, seed in zip(prompts, seeds.tolist(), strict=True):
        digest = hashlib.sha256(f"{made} {prompt}".encode()).hexdigest()[:8]
        file = f"{FOLDER}/teacher/{digest}-{seed}.mp4"
        rows.append({"prompt": prompt, "seed": seed, "teacher": file})
    videos = _Videos(pipe, asked, latents, rows, **how)
    if not all((workdir / row["teacher"]).is_file() for row in rows):
        _write(videos, workdir, [row["teacher"] for row in rows], latents)
    return videos


def _film(
    videos: _Videos, workdir: Path, step: int, student: Transformer
) -> tuple[dict, list[dict]]:
    """How far the student's final latents drift, and a row for each of its videos."""
    pipe = dataclasses.replace(videos.pipe, transformer=student)
    latents = final_latents(pipe, videos.asked, videos.defaults, videos.batch_size)
    files = [f"{FOLDER}/{step}/{Path(row['teacher']).name}" for row in videos.rows]
    _write(videos, workdir, files, latents)
    rows = [row | {"student": file} for row, file in zip(videos.rows, files, strict=True)]
    return compare_latents(latents, videos.latents), rows


def _write(videos: _Videos, workdir: Path, files: list[str], latents: np.ndarray) -> None:
    frames = videos.pipe.to_frames(latents, videos.batch_size)
    for file, clip in zip(files, frames, strict=True):
        path = workdir / file
        path.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: a teacher's file that is there is not made again.
        unfinished = path.with_suffix(".part")
        write_video(unfinished, clip, videos.pipe.defaults["fps"])
        unfinished.replace(path)


def _plain(content: Any) -> Any:
    """The same as JSON has it: numbers of a few digits, null where there is no number."""
    if isinstance(content, Mapping):
        return {name: _plain(value) for name, value in content.items()}
    if isinstance(content, list):
        return [_plain(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.{_DIGITS}g}") if math.isfinite(content) else None
    return content
