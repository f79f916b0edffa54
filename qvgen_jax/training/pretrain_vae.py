"""First stage of making a small pipeline: a Wan VAE from nothing, on short clips.

Reconstruction weighted towards the shape, with a light KL term. Batches and noise are functions of
the seed and the step, so that an interrupted run continues exactly.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig
from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError
from qvgen_jax.training.checkpoint import Checkpoints, newest_or
from qvgen_jax.training.metrics import MetricWriter
from qvgen_jax.training.vae_initialize import initial_params
from qvgen_jax.training.vae_stages import Stage, crops, learning_rate, read_stages, stage_at

_VISIBLE = 32 / 255  # What differs from the background by more, in [-1, 1], is the shape.


class TrainedVAE(NamedTuple):
    """The result: the model's config with its latents' statistics, and its float32 parameters."""

    config: WanVAEConfig
    params: dict


def load_clips(folder: str | Path) -> np.ndarray:
    """Decodes every mp4 of a folder, in name order: uint8 `[clips, frames, height, width, 3]`.

    Raises:
        UserError: the folder holds no mp4 files, or their shapes differ.
    """
    paths = sorted(Path(folder).glob("*.mp4"))
    if not paths:
        raise UserError(f"{folder} holds no mp4 files; make some: see qvgen_jax.data.moving_shapes")
    with ThreadPoolExecutor(4) as pool:
        clips = list(pool.map(read_video, paths))
    shapes = {clip.shape for clip in clips}
    if len(shapes) > 1:
        raise UserError(f"{folder} holds clips of different shapes {sorted(shapes)}; expected one")
    return np.stack(clips)


def vae_loss(
    model: WanVAE, batch: Mapping[str, jax.Array], key: jax.Array, config: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Foreground-weighted L1 + MSE + `kl_weight` times the mean KL per latent; and its parts."""
    video = batch["video"].astype(jnp.float32) / 127.5 - 1
    background = batch["background"].astype(jnp.float32)[:, None, None, None] / 127.5 - 1
    shape = jnp.max(jnp.abs(video - background), axis=-1, keepdims=True) > _VISIBLE
    weight = 1 + config["foreground_weight"] * shape.astype(jnp.float32)
    mean, logvar = model.encode_whole(video)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    error = model.decode_whole(mean + jnp.exp(0.5 * logvar) * noise) - video
    l1 = jnp.sum(weight * jnp.abs(error)) / (3 * jnp.sum(weight))
    mse = jnp.mean(jnp.square(error))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
    loss = l1 + mse + config["kl_weight"] * kl
    return loss, {"loss": loss, "l1": l1, "mse": mse, "kl": kl}


def make_step(
    graphdef: nnx.GraphDef, optimizer: optax.GradientTransformation, config: Mapping[str, Any]
) -> Callable[[dict, dict], tuple[dict, dict]]:
    """The compiled update of `{"params", "opt", "step"}` by one batch of `crops`."""

    def step_fn(state: dict, batch: dict) -> tuple[dict, dict]:
        def loss(params: dict) -> tuple[jax.Array, dict]:
            return vae_loss(nnx.merge(graphdef, params), batch, key, config)

        key = jax.random.fold_in(jax.random.key(config["seed"]), state["step"])
        grads, metrics = jax.grad(loss, has_aux=True)(state["params"])
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt, "step": state["step"] + 1}, metrics

    return jax.jit(step_fn, donate_argnums=0)


def make_optimizer(config: Mapping[str, Any], stages: list[Stage]) -> optax.GradientTransformation:
    """AdamW on clipped gradients, with `learning_rate`'s schedule."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(learning_rate(config, stages), b2=0.99, weight_decay=config["weight_decay"]),
    )


def reconstruct(model: WanVAE, video: jax.Array) -> jax.Array:
    """uint8 `[b, t, h, w, 3]` through the latents' mean and back to uint8."""
    mean, _ = model.encode(video.astype(jnp.float32) / 127.5 - 1)
    return jnp.round((model.decode(mean) + 1) * 127.5).astype(jnp.uint8)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of uint8 clips `[n, ...]`: the mean over clips."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).reshape(len(a), -1).mean(1)
    return float(np.mean(10 * np.log10(255**2 / np.maximum(error, 1e-6))))


def describe(config: WanVAEConfig, dtype: jnp.dtype) -> tuple[nnx.GraphDef, dict]:
    """The network's definition and the tree of its parameters' shapes; nothing is allocated."""
    model = nnx.eval_shape(lambda: WanVAE(config, key=jax.random.key(0), dtype=dtype))
    graphdef, params = nnx.split(model, nnx.Param)
    return graphdef, nnx.to_pure_dict(params)


def pretrain_vae(config: Mapping[str, Any], workdir: str | Path) -> TrainedVAE:
    """Trains a VAE; continues from `workdir` where an earlier run stopped.

    Args:
        config: `configs/tiny_pretrain.py`'s `vae_train`.
        workdir: `checkpoints/` and `metrics.jsonl` go there; `psnr` in it is of the first
            `eval_clips` clips, which are not trained on.

    Raises:
        UserError: the data are missing or do not fit the stages.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    clips = load_clips(config["data"])
    held_back, clips = clips[: config["eval_clips"]], clips[config["eval_clips"] :]
    stages = read_stages(config["stages"], clips)
    vae_config = WanVAEConfig.from_json(dict(config["model"]))
    graphdef, shapes = describe(vae_config, jnp.dtype(config["dtype"]))
    exact, _ = describe(vae_config, jnp.dtype(jnp.float32))
    optimizer = make_optimizer(config, stages)
    params = initial_params(shapes, jax.random.key(config["seed"]))
    state = {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}
    checkpoints = Checkpoints(workdir, keep=1)
    state = newest_or(checkpoints, state)
    step_fn = make_step(graphdef, optimizer, config)
    rebuild = jax.jit(lambda params, video: reconstruct(nnx.merge(exact, params), video))

    start, total, saved = int(state["step"]), sum(s.steps for s in stages), time.time()
    with (
        checkpoints,
        MetricWriter(workdir, start, total, title="autoencoder") as writer,
    ):
        for step in range(start, total):
            stage, last = stage_at(stages, step)
            batch = crops(clips, stage, np.random.default_rng([config["seed"], step]))
            state, metrics = step_fn(state, batch)
            writer.advance(step + 1)
            if (step + 1) % config["log_every"] == 0 or last:
                line = {name: float(value) for name, value in metrics.items()}
                if (step + 1) % config["eval_every"] == 0 or last:
                    seen = np.asarray(rebuild(state["params"], held_back))
                    line["psnr"] = psnr(seen, held_back)
                writer.write(step, {**line, "frames": stage.frames, "size": stage.size})
            if last or time.time() - saved > config["checkpoint_seconds"]:
                checkpoints.save(state)
                saved = time.time()
    return finish(vae_config, state["params"], clips[: config["statistics_clips"]])


def finish(config: WanVAEConfig, params: dict, clips: np.ndarray) -> TrainedVAE:
    """Rounds the parameters to float16, the stored form, and measures the latents of `clips`."""
    graphdef, _ = describe(config, jnp.dtype(jnp.float32))
    params = jax.tree.map(lambda x: x.astype(jnp.float16).astype(jnp.float32), params)

    @jax.jit
    def moments(video: jax.Array) -> tuple[jax.Array, jax.Array]:
        latents, _ = nnx.merge(graphdef, params).encode(video.astype(jnp.float32) / 127.5 - 1)
        axes = (0, 1, 2, 3)
        return jnp.mean(latents, axes), jnp.mean(jnp.square(latents), axes)

    size = min(16, len(clips))
    parts = [moments(clips[i : i + size]) for i in range(0, len(clips) - size + 1, size)]
    mean, square = np.mean(np.asarray(parts, np.float64), axis=0)
    std = np.sqrt(square - mean**2)
    statistics = (tuple(np.round(values, 4).tolist()) for values in (mean, std))
    config = dataclasses.replace(
        config, **dict(zip(("latents_mean", "latents_std"), statistics, strict=True))
    )
    return TrainedVAE(config, params)
