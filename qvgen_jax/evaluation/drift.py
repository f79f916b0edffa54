"""How far a student is from its teacher on what training never saw.

Two measurements, both paired (same clips, prompts and noise for everybody):

- *held out*: what both predict for held-out clips at fixed timesteps. This is the distillation
  loss without the luck of the batch, bucket by bucket.
- *drift*: how far the final latents of whole trajectories end apart, and whether anything still
  moves. A model can predict well step by step and drift, or stand still, over 25 of them.

Everything but `measure` is a function of arrays, so that a student can be asked while it trains.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.data.dataset import Dataset, EncodedDataset
from qvgen_jax.data.prepare import ensure_held_out
from qvgen_jax.diffusion.guidance import own_guidance
from qvgen_jax.diffusion.noising import noise_at
from qvgen_jax.diffusion.schedulers import Scheduler, make_schedule
from qvgen_jax.evaluation.evaluate import made_by
from qvgen_jax.evaluation.reference import reference_folder, save_arrays
from qvgen_jax.evaluation.samples import read_prompts
from qvgen_jax.file_lock import locked
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.training.step import fill_patches
from qvgen_jax.transformer import Transformer

# The centres of ten equal buckets of noise.
_CENTRES = np.arange(50, 1000, 100)

RESULT = "held_out.json"
_NOISE_SEED = 0
_NOISE_VERSION = 1  # Another one, once `noisy_latents` or the pipeline draws noise differently.


def bucket_timesteps(pipe: Pipeline) -> tuple[int, ...]:
    """Of the timesteps that the pipeline samples at, those nearest the centres of ten buckets.

    The ones it is used at, and the only ones that an export with a time table knows. Distinct, so
    that there may be fewer than ten: few steps with a shift leave gaps near the clean end.
    """
    visited = make_schedule(pipe.scheduler, pipe.defaults["steps"]).timesteps
    nearest = np.abs(np.asarray(visited)[:, None] - _CENTRES).argmin(0)
    return tuple(sorted({int(visited[row]) for row in nearest}))


def read_clips(dataset: Dataset, indices: Iterable[int] | None = None) -> dict[str, np.ndarray]:
    """Clips of one size, all of a (small) folder if no indices are given: `latents`
    `[clips, f, h, w, c]`, the posterior's mean, and `text_embeds` `[clips, max_length, dim]`."""
    clips = [dataset[index] for index in (range(len(dataset)) if indices is None else indices)]
    widths = [dataset.max_length - len(clip["text_embeds"]) for clip in clips]
    texts = [
        np.pad(clip["text_embeds"], ((0, missing), (0, 0)))
        for clip, missing in zip(clips, widths, strict=True)
    ]
    latents = np.stack([clip["latent_mean"] for clip in clips]).astype(np.float32)
    return {"latents": latents, "text_embeds": np.stack(texts)}


def noisy_latents(latents: jax.Array, index: jax.Array, timestep: int, scheduler: Scheduler):
    """`latents [clips, f, h, w, c]` at one timestep; the noise is a function of clip and timestep.

    Args:
        index: int32 `[clips]`, each clip's number in its folder.
    """
    key = jax.random.fold_in(jax.random.key(_NOISE_SEED), timestep)
    keys = jax.vmap(lambda clip: jax.random.fold_in(key, clip))(index)
    noise = jax.vmap(lambda key: jax.random.normal(key, latents.shape[1:], jnp.float32))(keys)
    timesteps = jnp.full(len(latents), timestep, jnp.float32)
    return noise_at(scheduler)(latents, noise, timesteps), timesteps


def predictions(
    transformer: Transformer,
    clips: Mapping[str, np.ndarray],
    scheduler: Scheduler,
    batch_size: int,
    timesteps: Sequence[int],
) -> np.ndarray:
    """What a transformer predicts for held-out clips: float32 `[timesteps, clips, f, h, w, c]`.

    Args:
        transformer: the teacher's, a student's in training, or an export's.
        clips: of `read_clips`.
        scheduler: the pipeline's, which says how noise and latents are mixed.
        batch_size: clips per call; one compilation serves all calls.
        timesteps: 0 (clean) to 1000 (noise).
    """
    latents, texts = clips["latents"], clips["text_embeds"]
    filled = {"latent_mean": latents, "latent_logvar": latents}
    latents = fill_patches(filled, transformer.config.patch_size[0])["latent_mean"]
    count = len(latents)
    size = min(batch_size, count)
    found = []
    for timestep in timesteps:
        rows_of_timestep = []
        for start in range(0, count, size):
            rows = np.minimum(np.arange(start, start + size), count - 1)
            noisy, times = noisy_latents(
                jnp.asarray(latents[rows]), jnp.asarray(rows, jnp.int32), timestep, scheduler
            )
            velocity = transformer(noisy, times, jnp.asarray(texts[rows]))
            rows_of_timestep.append(np.asarray(velocity, np.float32)[: count - start])
        found.append(np.concatenate(rows_of_timestep))
    return np.stack(found)


def compare_predictions(student: np.ndarray, teacher: np.ndarray) -> dict:
    """The held-out distillation loss and its relatives, of arrays `[timesteps, clips, ...]`.

    Returns:
        Lists with a number per timestep: `mse`; `normalised`, the same divided by the variance of
        the teacher's prediction; `cosine` and `relative` (norm of the difference by the teacher's
        norm), means over clips. `mean` holds each one's mean over timesteps, `per_clip` a
        normalised loss for every clip, for paired comparisons.
    """
    ours = student.reshape(*student.shape[:2], -1).astype(np.float64)
    theirs = teacher.reshape(*teacher.shape[:2], -1).astype(np.float64)
    squares = np.square(ours - theirs).mean(-1)
    variance = theirs.var(axis=(1, 2))
    lengths = np.linalg.norm(ours, axis=-1), np.linalg.norm(theirs, axis=-1)
    by_timestep = {
        "mse": squares.mean(1),
        "normalised": squares.mean(1) / variance,
        "cosine": ((ours * theirs).sum(-1) / (lengths[0] * lengths[1])).mean(1),
        "relative": (np.linalg.norm(ours - theirs, axis=-1) / lengths[1]).mean(1),
    }
    return {
        "clips": ours.shape[1],
        **{name: values.tolist() for name, values in by_timestep.items()},
        "mean": {name: float(values.mean()) for name, values in by_timestep.items()},
        "per_clip": (squares / variance[:, None]).mean(0).tolist(),
    }


def _motion(latents: np.ndarray) -> np.ndarray:
    """Mean squared change from one latent frame to the next: `[videos]`."""
    return np.square(np.diff(latents, axis=1)).mean(axis=(1, 2, 3, 4))


def compare_latents(student: np.ndarray, teacher: np.ndarray) -> dict:
    """Drift of final latents `[videos, f, h, w, c]` that began from the same noise.

    Returns:
        `relative`: norm of the difference by the teacher's norm, over all videos; `per_video` the
        same one by one. `motion` and `variance`: the student's total change between frames, and its
        variance, by the teacher's; 1 is as lively. `motion_least`: of the video that moves least,
        by that measure: near 0, it stands still where the teacher's moves. NaN for single frames.
    """
    ours, theirs = student.astype(np.float64), teacher.astype(np.float64)
    axes = tuple(range(1, ours.ndim))
    gaps = np.sqrt(np.square(ours - theirs).sum(axes))
    norms = np.sqrt(np.square(theirs).sum(axes))
    motion = None
    if ours.shape[1] > 1:
        motion = _motion(ours), _motion(theirs)
    return {
        "videos": len(ours),
        "relative": float(np.linalg.norm(gaps) / np.linalg.norm(norms)),
        "per_video": (gaps / norms).tolist(),
        "motion": float(motion[0].sum() / motion[1].sum()) if motion else float("nan"),
        "motion_least": float((motion[0] / motion[1]).min()) if motion else float("nan"),
        "variance": float(ours.var(axes).sum() / theirs.var(axes).sum()),
    }


def measure(config: Mapping, workdir: Path, teacher: Pipeline, student: Pipeline) -> dict:
    """Both measurements as `config.evaluate` asks for them; writes `held_out.json`.

    The teacher's part is computed once per `evaluate.reference` folder.

    Args:
        config: reads `evaluate.held_out` ("" for none), `drift_videos` (0 for none), `reference`,
            `seed`, and `sample.prompts` and `batch_size`.
        workdir: of the run.
        teacher, student: loaded pipelines; the student's is the export, so that what ships is
            measured.
    """
    result = {}
    for name, asked, answer, compare in _measurements(config, workdir, teacher):
        theirs = teachers_answer(config, workdir, teacher, name, asked, answer)
        start = time.perf_counter()
        found = compare(answer(student, asked), theirs)
        result[name] = {**found, "seconds": round(time.perf_counter() - start, 2)}
    if result:
        result["timesteps"] = list(bucket_timesteps(teacher))
        (workdir / RESULT).write_text(json.dumps(result, indent=1))
    return result


def held_out_comparison(
    config: Mapping, workdir: Path, teacher: Pipeline
) -> Callable[[Transformer], dict]:
    """What `compare_predictions` says of a student, and `timesteps`; the teacher is asked now.

    Args:
        config: reads `evaluate.held_out` and `reference`, and `sample.batch_size`.
        workdir: of the run.
        teacher: the full-precision pipeline.
    """
    only = {**config, "evaluate": {**config["evaluate"], "drift_videos": 0}}
    ((name, asked, answer, compare),) = _measurements(only, workdir, teacher)
    theirs = teachers_answer(config, workdir, teacher, name, asked, answer)
    timesteps, size = bucket_timesteps(teacher), config["sample"]["batch_size"]

    def compared(student: Transformer) -> dict:
        ours = predictions(student, asked, teacher.scheduler, size, timesteps)
        return {"timesteps": list(timesteps), **compare(ours, theirs)}

    return compared


def final_latents(
    pipe: Pipeline, asked: Mapping[str, np.ndarray], defaults: Mapping[str, Any], batch_size: int
) -> np.ndarray:
    """What a pipeline's trajectories end in, float32 `[videos, f, h, w, c]`.

    Args:
        pipe: the teacher's or a student's.
        asked: `prompts` and `seeds`, `[videos]` each.
        defaults: the teacher's, whose guidance is everybody's: an export that ships with less of it
            would be compared in that.
        batch_size: videos at once, at most.
    """
    prompts, seeds = asked["prompts"].tolist(), asked["seeds"].tolist()
    size = min(batch_size, len(prompts))
    return pipe.sample_latents(
        prompts, seeds=seeds, batch_size=size, guidance=own_guidance(defaults)
    )


def _measurements(config: Mapping, workdir: Path, teacher: Pipeline) -> list[tuple]:
    """(name, what is asked, the function that answers, the function that compares) of each."""
    evaluate, batch_size = config["evaluate"], config["sample"]["batch_size"]

    timesteps = bucket_timesteps(teacher)

    def predict(pipe: Pipeline, clips: Mapping) -> np.ndarray:
        return predictions(pipe.transformer, clips, teacher.scheduler, batch_size, timesteps)

    def sample(pipe: Pipeline, asked: Mapping) -> np.ndarray:
        return final_latents(pipe, asked, teacher.defaults, batch_size)

    wanted = []
    if evaluate["held_out"]:
        folder = ensure_held_out(config, workdir, teacher)
        clips = read_clips(EncodedDataset(folder, config["data"]["max_length"]))
        asked = {**clips, "timesteps": np.array(timesteps)}
        wanted.append(("held_out", asked, predict, compare_predictions))
    if count := evaluate["drift_videos"]:
        prompts = read_prompts(config["sample"]["prompts"], count)
        seeds = evaluate["seed"] + np.arange(len(prompts))
        asked = {"prompts": np.array(prompts), "seeds": seeds}
        wanted.append(("drift", asked, sample, compare_latents))
    return wanted


def teachers_answer(
    config: Mapping,
    workdir: Path,
    teacher: Pipeline,
    name: str,
    asked: Mapping[str, np.ndarray],
    answer: Callable[[Pipeline, Mapping], np.ndarray],
) -> np.ndarray:
    """`answer(teacher, asked)`, from the reference folder if it was asked the same before."""
    digest = hashlib.sha256(f"{made_by(teacher)} {_NOISE_SEED} {_NOISE_VERSION}".encode())
    for array in asked.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    folder = reference_folder(config, workdir)
    path = folder / f"{name.replace('_', '-')}-{digest.hexdigest()[:12]}.npz"
    with locked(folder):
        if not path.is_file():
            save_arrays(path, answer=answer(teacher, asked))
    with np.load(path) as arrays:
        return arrays["answer"]
