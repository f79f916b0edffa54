"""One training step: noise, teacher, student, loss, update. Pure functions of state and batch."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from kernels.reference import at_least_float32, wide_type
from qvgen_jax.diffusion.noising import Noising
from qvgen_jax.quant.low_rank import drop_branch
from qvgen_jax.quant.schedule import RankDecay, fade_at, gate_at, rank_at
from qvgen_jax.sharding import laid_out
from qvgen_jax.training.optimizer import (
    group_norms,
    joined,
    keep_scales_positive,
    leaf_name,
    learning_rates,
    split_frozen,
)


class Recipe(NamedTuple):
    """Everything static about a step; closed over, never traced.

    Attributes:
        student, teacher: NNX graph definitions; their parameters are arguments of the step.
        decay: rank and gate as functions of step.
        optimizer: the update rule.
        noising: makes noisy latents and a timestep of a clean clip.
        temporal_patch: latent frames per token of the model.
        train: the `train` section of the config.
        tail: the step where the learning rates' constant tail begins, if they have one.
    """

    student: nnx.GraphDef
    teacher: nnx.GraphDef
    decay: RankDecay
    optimizer: optax.GradientTransformation
    noising: Noising
    temporal_patch: int
    train: Mapping
    tail: int


def order_seed(seed: jax.Array | int, order: jax.Array | int) -> jax.Array | int:
    """The seed of data, noise and timesteps after the run went back `order` times."""
    return seed + 7919 * order


def sample_keys(seed: jax.Array | int, step: jax.Array, sample_index: jax.Array) -> jax.Array:
    """One key per sample, `[batch]`, a function of (seed, step, global sample index) alone.

    The release seeds every rank alike, so that all draw the same noise; here no two samples share
    a key, on any number of hosts.
    """
    step_key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.vmap(lambda index: jax.random.fold_in(step_key, index))(sample_index)


def fill_patches(batch: Mapping, temporal_patch: int) -> dict:
    """Clips whose latent frames divide into patches: the first one is repeated in front.

    As CogVideoX1.5's authors finetune it; with patches of one frame nothing changes.
    """
    extra = -batch["latent_mean"].shape[1] % temporal_patch
    filled = dict(batch)
    for name in ("latent_mean", "latent_logvar"):
        frames = batch[name]
        filled[name] = jnp.concatenate([*[frames[:, :1]] * extra, frames], axis=1)
    return filled


def noisy_inputs(
    batch: Mapping,
    keys: jax.Array,
    noising: Noising,
    caption_dropout: float,
    empty_text: jax.Array,
) -> dict:
    """What teacher and student both see.

    Args:
        batch: `latent_mean`, `latent_logvar` `[b, f, h, w, c]` (normalised), `text_embeds`
            `[b, n, d]`.
        keys: `[b]` random keys.
        noising: see `Recipe`.
        caption_dropout: how often the empty prompt takes the caption's place.
        empty_text: `[n, d]`, the embedding of the empty prompt.

    Returns:
        `latents` (noisy), `timesteps` `[b]`, `text_embeds`, and `velocity`, the ground truth.
    """

    def one(key: jax.Array, mean: jax.Array, logvar: jax.Array, text: jax.Array) -> dict:
        posterior, normal, time, caption = jax.random.split(key, 4)
        spread = jnp.exp(0.5 * logvar) * jax.random.normal(posterior, mean.shape, mean.dtype)
        clean = mean + spread
        noise = jax.random.normal(normal, mean.shape, mean.dtype)
        noisy, timestep, velocity = noising(time, clean, noise)
        dropped = jax.random.uniform(caption, (), jnp.float32) < caption_dropout
        return {
            "latents": noisy,
            "timesteps": timestep,
            "text_embeds": jnp.where(dropped, empty_text, text),
            "velocity": velocity,
        }

    mean, logvar = (at_least_float32(batch[name]) for name in ("latent_mean", "latent_logvar"))
    return jax.vmap(one)(keys, mean, logvar, batch["text_embeds"])


def teacher_share(timesteps: jax.Array, blend: float) -> jax.Array:
    """How much of the loss is the teacher's: `l = (e^(a s) - 1) / (e^a - 1)` at noise level s.

    1 at noise, 0 at the clean clip; the ground truth has the rest (DSAQuant, arXiv 2609.04031,
    whose time runs the other way).

    Args:
        timesteps: `[b]`, 0 (clean) to 1000 (noise).
        blend: a; 0 leaves everything to the teacher.
    """
    timesteps = at_least_float32(timesteps)
    if not blend:
        return jnp.ones_like(timesteps)
    return jnp.expm1(blend * timesteps / 1000) / jnp.expm1(jnp.asarray(blend, timesteps.dtype))


def distillation_loss(
    params: dict, levels: dict, teacher_params: dict, inputs: dict, gate: jax.Array, recipe: Recipe
) -> tuple[jax.Array, dict]:
    """Mean squared error of the student's prediction, in float32; and how much both change.

    Against the teacher's, or against the ground truth by `teacher_share`. The prediction is a
    velocity in both families. The release compares CogVideoX's implied clean latents with weight
    1 / (1 - alphas_cumprod), which is the same. So are, up to that choice, Q-DM's noise-estimating
    mimicking (NeurIPS 2023) and EfficientDM's distillation (arXiv 2310.03270, eq. 7).

    Returns:
        The loss, and `motion` of the student's and the teacher's prediction.
    """
    teacher = nnx.merge(recipe.teacher, teacher_params)
    student = nnx.merge(recipe.student, params, levels)
    arguments = (inputs["latents"], inputs["timesteps"], inputs["text_embeds"])
    target = at_least_float32(jax.lax.stop_gradient(teacher(*arguments)))
    prediction = at_least_float32(student(*arguments, gate=gate))
    axes = tuple(range(1, prediction.ndim))
    loss = jnp.mean(jnp.square(prediction - target), axes)
    blend = recipe.train["truth_blend"]
    if blend:
        share = teacher_share(inputs["timesteps"], blend)
        truth = jnp.mean(jnp.square(prediction - inputs["velocity"]), axes)
        loss = share * loss + (1 - share) * truth
    # Stopped: no part of what is differentiated.
    moved = {"student": motion(jax.lax.stop_gradient(prediction)), "teacher": motion(target)}
    return jnp.mean(loss), moved


def truth_loss(
    params: dict, levels: dict, inputs: dict, gate: jax.Array, recipe: Recipe
) -> tuple[jax.Array, dict]:
    """As `distillation_loss`, against the ground truth alone: no teacher is asked.

    LSQ trains on its task's own loss (arXiv 1902.08153). The teacher's motion comes out as 0.
    """
    student = nnx.merge(recipe.student, params, levels)
    arguments = (inputs["latents"], inputs["timesteps"], inputs["text_embeds"])
    prediction = at_least_float32(student(*arguments, gate=gate))
    moved = motion(jax.lax.stop_gradient(prediction))
    loss = jnp.mean(jnp.square(prediction - inputs["velocity"]))
    return loss, {"student": moved, "teacher": jnp.zeros_like(moved)}


def motion(video: jax.Array) -> jax.Array:
    """Mean variance over frames of `[b, f, h, w, c]`; 0 where nothing moves."""
    return jnp.mean(jnp.var(video, axis=1))


def averaged(ema: dict, params: dict, step: jax.Array, recipe: Recipe) -> dict:
    """The average after the update of `step`: while the branch lives, the parameters themselves.

    From there on `keep = min(ema_decay, (1 + n) / (10 + n))` after n updates, as TensorFlow's
    ExponentialMovingAverage ramps it: a run that starts at rank 0 soon forgets its first weights.
    """
    # An average across the branch's shrinking would mix networks that differ in what it carries.
    made = (step - recipe.decay.end).astype(jnp.float32)
    ramp = jnp.minimum(recipe.train["ema_decay"], (1 + made) / (10 + made))
    keep = jnp.where(made < 0, 0.0, ramp).astype(jnp.float32)
    return jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, ema, drop_branch(params))


def in_parts(x: jax.Array, parts: int) -> jax.Array:
    """`[batch, ...]` as `[parts, batch / parts, ...]`; over a mesh, every device's own samples."""
    return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)


def _accumulated(loss: Callable, params: dict, inputs: dict, parts: int) -> tuple:
    """What `loss` gives, and its gradient, averaged over `parts` equal slices of the batch.

    One slice is in memory at a time.
    """
    graded = jax.value_and_grad(loss, has_aux=True)
    if parts == 1:
        return graded(params, inputs)
    slices = jax.tree.map(lambda x: in_parts(x, parts), inputs)

    def add(total: tuple, part: dict) -> tuple:
        return jax.tree.map(jnp.add, total, graded(params, part)), None

    zero = jnp.zeros((), wide_type(inputs["latents"].dtype))
    scalars = zero, {"student": zero, "teacher": zero}
    zeros = (scalars, laid_out(jax.tree.map(jnp.zeros_like, params)))
    total, _ = jax.lax.scan(add, zeros, slices)
    return jax.tree.map(lambda x: x / parts, total)


def train_step(
    state: dict,
    batch: dict,
    teacher_params: dict,
    empty_text: jax.Array,
    seed: jax.Array,
    recipe: Recipe,
) -> tuple[dict, dict]:
    """One update; none where loss or gradient is not finite, which is counted.

    Args:
        state: see `qvgen_jax.training.state`; may be donated.
        batch: arrays of `noisy_inputs` and `sample_index` int32 `[b]`, global.
        teacher_params: the full-precision model's dict.
        empty_text: `[n, d]`.
        seed: int32 `[]`, of noise, timesteps and caption dropout; an argument, so that runs which
            differ in nothing else share one compiled program.
        recipe: static.

    Returns:
        The new state, and scalars: loss, grad_norm, motion (the student's by the teacher's),
        skipped, gate, rank, a rate per group, and what `group_norms` and `mean_clips` give.
        Beside them `finite`, bool of each array of the gradient (of the sum of its squares), in the
        order of all parameters' leaves; True of those that do not train.
    """
    step = state["step"]
    keys = sample_keys(order_seed(seed, state["order"]), step, batch["sample_index"])
    dropout = recipe.train["caption_dropout"]
    filled = fill_patches(batch, recipe.temporal_patch)
    inputs = noisy_inputs(filled, keys, recipe.noising, dropout, empty_text)
    gate = gate_at(step, recipe.decay)

    before, frozen = split_frozen(state["params"], recipe.train["freeze_weights"])

    def loss_of(trained: dict, part: dict) -> tuple[jax.Array, dict]:
        student = (joined(trained, frozen), state["levels"])
        if recipe.train["target"] == "truth":
            return truth_loss(*student, part, gate, recipe)
        return distillation_loss(*student, teacher_params, part, gate, recipe)

    parts = recipe.train["accumulate"]
    (loss, moved), grads = _accumulated(loss_of, before, inputs, parts)
    updates, opt = recipe.optimizer.update(grads, state["opt"], before)
    params = keep_scales_positive(optax.apply_updates(before, updates), before)
    of_leaf = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf)), grads)
    squares = jnp.stack(jax.tree.leaves(of_leaf))
    norm = jnp.sqrt(jnp.sum(squares))
    good = jnp.isfinite(loss) & jnp.isfinite(norm)
    params, opt = unless_bad(good, (params, opt), (before, state["opt"]))
    of_frozen = jax.tree.map(lambda leaf: jnp.zeros((), squares.dtype), frozen)
    every = jax.tree.leaves(joined(of_leaf, of_frozen))
    params = joined(params, frozen)
    skipped = {
        "in_a_row": jnp.where(good, 0, state["skipped"]["in_a_row"] + 1),
        "in_all": state["skipped"]["in_all"] + ~good,
    }
    rates = learning_rates(recipe.train, recipe.tail)
    rank = rank_at(step, recipe.decay)
    metrics = {
        "loss": loss,
        "grad_norm": norm,
        # Of one frame there is none, nor where no teacher is asked: both are level then.
        "motion": jnp.where(moved["teacher"] > 0, moved["student"] / moved["teacher"], 1.0),
        **group_norms(squares, before),
        **mean_clips(params),
        "skipped": skipped["in_all"],
        "finite": jnp.isfinite(jnp.stack(every)),
        "gate": fade_at(step, recipe.decay) * (rank > 0),
        "rank": rank,
        **{f"lr_{group}": jnp.asarray(rate(step), jnp.float32) for group, rate in rates.items()},
    }
    new = {**state, "params": params, "opt": opt, "step": step + 1, "skipped": skipped}
    if "ema" in state:
        new["ema"] = averaged(state["ema"], params, step, recipe)
    return new, metrics


def mean_clips(params: dict) -> dict[str, jax.Array]:
    """`clip_low` and `clip_high`: what tokens' ranges are multiplied by, over all learned pairs.

    Nothing where no layer is quantized.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    means = {}
    for name, leaf in (("clip_low", "lower"), ("clip_high", "upper")):
        raw = [array.reshape(-1) for path, array in leaves if leaf_name(path) == leaf]
        if raw:
            means[name] = jnp.mean(jax.nn.sigmoid(jnp.concatenate(raw)))
    return means


def unless_bad(good: jax.Array, new: Any, old: Any) -> Any:
    """The new arrays, or, where the step was not finite, the old ones; counters go on anyway."""
    return jax.tree.map(
        lambda a, b: jnp.where(good, a, b) if jnp.issubdtype(a.dtype, jnp.floating) else a, new, old
    )
