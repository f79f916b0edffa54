"""Second stage of making a small pipeline: flow matching, transformer and text encoder together.

The clips are already latents (`pretrain_vae` made the autoencoder). Latents, captions and the
order they come in are functions of the seed, so that an interrupted run continues exactly.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qvgen_jax.diffusion.flow import add_noise, sample_sigmas, to_timesteps, velocity_target
from qvgen_jax.training.checkpoint import Checkpoints, newest_or
from qvgen_jax.training.metrics import MetricWriter
from qvgen_jax.training.step import sample_keys


class Clips(NamedTuple):
    """A data set in memory.

    Attributes:
        mean, logvar: float32 `[clips, f, h, w, c]`, normalised latents.
        tokens, mask: int32 `[clips, n]`; the last row of each is the empty prompt's.
    """

    mean: np.ndarray
    logvar: np.ndarray
    tokens: np.ndarray
    mask: np.ndarray


def foreground(latents: jax.Array) -> jax.Array:
    """Where something moves: `[b, f, h, w, 1]` in [0, 1], from latents `[b, f, h, w, c]`.

    Distance from the frame's median latent, which is the plain background's, saturating at the
    mean distance. Most of a small clip is background; the shape's edge is what must be learned.
    """
    background = jnp.median(latents, axis=(2, 3), keepdims=True)
    distance = jnp.linalg.norm(latents - background, axis=-1, keepdims=True)
    typical = jnp.mean(distance, axis=(1, 2, 3, 4), keepdims=True) + 1e-6
    return jnp.minimum(distance / typical, 1.0)


def batch_indices(seed: int, step: int, batch_size: int, count: int) -> np.ndarray:
    """Which clips step `step` sees: shuffled passes over the data, a function of its arguments."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    out = np.empty(batch_size, np.int64)
    for epoch in np.unique(positions // count):
        order = np.random.default_rng([seed, epoch]).permutation(count)
        here = positions // count == epoch
        out[here] = order[positions[here] % count]
    return out


def make_optimizer(flow: Mapping) -> optax.GradientTransformation:
    """AdamW: warm-up, constant rate, then cosine to a hundredth of it."""
    peak, steps, hold = flow["learning_rate"], flow["steps"], int(flow["hold"] * flow["steps"])
    warmup = flow["warmup_steps"]
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, peak, warmup),
            optax.constant_schedule(peak),
            optax.cosine_decay_schedule(peak, steps - hold, alpha=0.01),
        ],
        [warmup, hold],
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.99, weight_decay=flow["weight_decay"]),
    )


def flow_loss(params: dict, batch: dict, definitions: Mapping, flow: Mapping) -> jax.Array:
    """Weighted mean squared error of the velocity; `definitions` are NNX graph definitions."""
    text = nnx.merge(definitions["text_encoder"], params["text_encoder"])
    transformer = nnx.merge(definitions["transformer"], params["transformer"])
    embeds = text(batch["tokens"], batch["mask"]) * batch["mask"][..., None]

    def noisy(key: jax.Array, mean: jax.Array, logvar: jax.Array) -> tuple:
        posterior, noising, time = jax.random.split(key, 3)
        spread = jnp.exp(0.5 * logvar) * jax.random.normal(posterior, mean.shape, jnp.float32)
        noise = jax.random.normal(noising, mean.shape, jnp.float32)
        return mean + spread, noise, sample_sigmas(time, (), flow["shift"])

    clean, noise, sigma = jax.vmap(noisy)(batch["keys"], batch["mean"], batch["logvar"])
    prediction = transformer(add_noise(clean, noise, sigma), to_timesteps(sigma), embeds)
    error = jnp.square(prediction.astype(jnp.float32) - velocity_target(clean, noise))
    weight = 1.0 + flow["foreground_weight"] * foreground(batch["mean"])
    return jnp.mean(weight * error) / jnp.mean(weight)


def flow_step(
    state: dict,
    batch: dict,
    optimizer: optax.GradientTransformation,
    definitions: Mapping,
    flow: Mapping,
    seed: int,
) -> tuple[dict, dict]:
    """One update; `state` is `{"params", "ema", "opt", "step"}`."""
    keys = sample_keys(seed, state["step"], batch["sample_index"])
    batch = {**batch, "keys": keys}
    loss, grads = jax.value_and_grad(flow_loss)(state["params"], batch, definitions, flow)
    updates, opt = optimizer.update(grads, state["opt"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    decay = jnp.minimum(flow["ema"], (1.0 + state["step"]) / (10.0 + state["step"]))
    ema = jax.tree.map(lambda old, new: decay * old + (1.0 - decay) * new, state["ema"], params)
    new = {"params": params, "ema": ema, "opt": opt, "step": state["step"] + 1}
    return new, {"loss": loss, "grad_norm": optax.global_norm(grads)}


def take_batch(clips: Clips, step: int, flow: Mapping, seed: int) -> dict:
    """The arrays of one step, captions dropped to the empty prompt at random."""
    size, count = flow["batch_size"], len(clips.mean)
    chosen = batch_indices(seed, step, size, count)
    dropped = np.random.default_rng([seed, step, 1]).random(size) < flow["caption_dropout"]
    captions = np.where(dropped, count, chosen)
    return {
        "mean": clips.mean[chosen],
        "logvar": clips.logvar[chosen],
        "tokens": clips.tokens[captions],
        "mask": clips.mask[captions],
        "sample_index": np.arange(step * size, (step + 1) * size, dtype=np.int32),
    }


def pretrain_flow(
    definitions: Mapping,
    params: dict,
    clips: Clips,
    flow: Mapping,
    seed: int,
    workdir: Path,
    evaluate: Callable[[dict], dict],
) -> dict:
    """Train to `flow["steps"]` from scratch or from the newest checkpoint in `workdir`.

    Args:
        definitions: NNX graph definitions of `transformer` and `text_encoder`.
        params: initial parameters under the same names.
        clips: the data.
        flow: the `flow` section of the config.
        seed: of order, noise and caption dropout.
        workdir: checkpoints, `metrics.jsonl` and `judge.jsonl` go there.
        evaluate: the judge's shares, as a dict of floats, of averaged parameters.

    Returns:
        The exponential moving average of the parameters.
    """
    optimizer = make_optimizer(flow)
    zero = jnp.zeros((), jnp.int32)
    state = {"params": params, "ema": params, "opt": optimizer.init(params), "step": zero}
    checkpoints = Checkpoints(workdir, keep=2)
    state = newest_or(checkpoints, state)
    state = jax.tree.map(jnp.copy, state)  # Own buffers: params and ema share theirs at step 0.
    step_fn = jax.jit(
        partial(flow_step, optimizer=optimizer, definitions=definitions, flow=flow, seed=seed),
        donate_argnums=0,
    )
    start = int(state["step"])
    with (
        checkpoints,
        MetricWriter(workdir, start, flow["steps"], title="flow matching") as writer,
    ):
        for step in range(start, flow["steps"]):
            state, metrics = step_fn(state, take_batch(clips, step, flow, seed))
            done = step + 1
            writer.advance(done)
            if done % flow["log_every"] == 0:
                writer.write(step, {name: float(value) for name, value in metrics.items()})
            if done % flow["evaluate_every"] == 0 or done == flow["steps"]:
                with (workdir / "judge.jsonl").open("a") as file:
                    file.write(json.dumps({"step": done, **evaluate(state["ema"])}) + "\n")
            if done % flow["checkpoint_every"] == 0 or done == flow["steps"]:
                checkpoints.save(state)
    return state["ema"]
