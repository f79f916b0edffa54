"""What a scan looks at: a run's teacher, and a few of its clips at a few timesteps."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qvgen_jax.components import fingerprint
from qvgen_jax.data.dataset import Dataset, EncodedDataset
from qvgen_jax.data.prepare import (
    check_held_out,
    check_sizes,
    check_source,
    ensure_held_out,
    read_dataset,
)
from qvgen_jax.diffusion.schedulers import make_schedule
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.drift import read_clips
from qvgen_jax.mixed.probe import Probe, Samples
from qvgen_jax.models import TransformerConfig
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.training.calibrate import BATCHES, activation_maxima
from qvgen_jax.training.feed import feed
from qvgen_jax.training.run import load_model
from qvgen_jax.training.student import quant_config
from qvgen_jax.training.teacher import as_held

# Of the `quant` section, what decides a scan's numbers beside the bits.
_DECIDES = ("behaviour", "symmetric_weights", "include_zero", "rotation", "smoothing", "time_table")


class Probed(NamedTuple):
    """A probe and what it is fed.

    Attributes:
        probe: of the network.
        teacher: its parameters.
        quant: of the run.
        model: its sizes.
        activations: where the run smooths.
        asked: what decides the numbers of a scan.
    """

    probe: Probe
    teacher: dict
    quant: QuantConfig
    model: TransformerConfig
    activations: Mapping[str, jax.Array] | None
    asked: dict[str, Any]


def check_probe(config: Mapping, workdir: Path, job: str) -> None:
    """Refuse what a probe cannot be made of, before a model is loaded.

    Raises:
        UserError: several processes, or clips that are not there.
    """
    if jax.process_count() > 1:
        raise UserError(f"--job {job} is for one process and one device; start it alone")
    check_source(config, workdir)
    check_held_out(config, workdir)


def asked_by(config: Mapping, quant: QuantConfig) -> dict[str, Any]:
    """Of what decides a scan's numbers, the part that the config alone says.

    Args:
        config: of a training run.
        quant: of it.
    """
    train = config["train"]
    smoothing = {
        "seed": config["seed"],
        "batch_size": train["batch_size"],
        "caption_dropout": train["caption_dropout"],
        "shift": train.get("shift"),
    }
    return {
        "quant": {
            **{key: config["quant"][key] for key in _DECIDES},
            "full_precision": list(quant.full_precision),
        },
        "compute_dtype": config["compute_dtype"],
        "smoothing": smoothing if quant.smoothing else None,
    }


def left_out(quant: QuantConfig) -> list[str]:
    """A line on what the run has and a probe has not, if there is something."""
    parts = []
    if quant.rank:
        kind = "merged adapter" if quant.merged else "low-rank branch"
        parts.append(f"the {kind} of rank {quant.rank}")
    if quant.learned_steps:
        parts.append("the learned steps of activations (tokens have ranges of their own)")
    return [f"measured without {' and '.join(parts)}"] if parts else []


def read_probed(
    config: Mapping, workdir: Path, clips: int, timesteps: int | tuple[int, ...]
) -> Probed:
    """Loads the pipeline, and the clips: held-out ones where the config has some.

    Args:
        config: of a training run.
        workdir: where clips are encoded to, if they are not yet.
        clips: how many.
        timesteps: how many, or which.

    Raises:
        UserError: a wrong model or data folder.
    """
    pipe = load_model(config)
    check_sizes(config, pipe)
    model = pipe.transformer.config
    quant = quant_config(config["quant"], model)
    dataset, taken = _clips(config, workdir, pipe, clips)
    if isinstance(timesteps, int):
        timesteps = spread_timesteps(pipe, timesteps)
    size = config["sample"]["batch_size"]
    samples = Samples(taken, timesteps, pipe.scheduler, model.patch_size[0], size)
    full = pipe.transformer.states[0]
    asked = {
        "model": fingerprint(pipe.transformer),
        **asked_by(config, quant),
        "scheduler": repr(pipe.scheduler),
        "timesteps": list(samples.timesteps),
        "clips": samples.clips,
        "clips_digest": _digest(taken),
        "smoothing_digest": _digest(*_batches(config, dataset)) if quant.smoothing else None,
    }
    activations = activation_maxima(config, model, pipe.scheduler, full, dataset)
    dtype = jnp.dtype(config["compute_dtype"])
    probe = Probe(model, quant, dtype, samples)
    # Thousands of calls take them: once to the device.
    teacher = jax.device_put(as_held(full, dtype))
    return Probed(probe, teacher, quant, model, activations, asked)


def spread_timesteps(pipe: Pipeline, count: int) -> tuple[int, ...]:
    """Of the timesteps that the pipeline samples at, those in the middle of `count` equal parts.

    The first and the last step are nobody's middle; every part has as many steps of the sampler, so
    that the mean over them is a trajectory's.
    """
    visited = np.asarray(make_schedule(pipe.scheduler, pipe.defaults["steps"]).timesteps)
    places = (np.arange(count) + 0.5) * len(visited) / count
    return tuple(sorted({int(visited[int(place)]) for place in places}))


def _clips(
    config: Mapping, workdir: Path, pipe: Pipeline, count: int
) -> tuple[Dataset, dict[str, np.ndarray]]:
    """The training clips (what smoothing is measured on), and those that the scan takes."""
    held_out = config["evaluate"]["held_out"]
    training = None
    if not held_out or config["quant"]["smoothing"]:
        training = read_dataset(config, workdir, pipe)
    dataset = training
    if held_out:
        folder = ensure_held_out(config, workdir, pipe)
        dataset = EncodedDataset(folder, config["data"]["max_length"])
    if not dataset.buckets:
        raise UserError("there are no clips to scan with; give config.data.source some videos")
    # Of one size, spread over all of it.
    rows = max(dataset.buckets.values(), key=len)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return training, read_clips(dataset, [rows[i] for i in chosen])


def _batches(config: Mapping, dataset: Dataset) -> list[dict]:
    """Those that smoothing is measured on."""
    data = feed(dataset, config)
    return [next(data) for _ in range(BATCHES)]


def _digest(*parts: Mapping[str, np.ndarray]) -> str:
    """Of all arrays of dicts that have the same names."""
    content = hashlib.sha256()
    for arrays in parts:
        for name in sorted(arrays):
            content.update(np.ascontiguousarray(arrays[name]).tobytes())
    return content.hexdigest()[:12]
