"""The training run: from a config and a workdir to the trained student's state."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from qvgen_jax.data.dataset import EncodedDataset, batches
from qvgen_jax.data.prepare import check_source, ensure_encoded
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.pipeline import Pipeline, load
from qvgen_jax.placement import Shardings
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import drop_branch, on_every_branch, reverse, small_singular_share
from qvgen_jax.quant.schedule import RankDecay, phase_steps_for
from qvgen_jax.training import checkpoint
from qvgen_jax.training.calibrate import activation_maxima, unmeasured
from qvgen_jax.training.check import check_config, check_unguided
from qvgen_jax.training.metrics import MetricWriter
from qvgen_jax.training.optimizer import make_optimizer
from qvgen_jax.training.state import create_state, enter_step, has_branch
from qvgen_jax.training.step import Recipe, train_step
from qvgen_jax.training.student import (
    describe_layers,
    quant_config,
    student_definition,
    teacher_definition,
)


def rank_decay(config: Mapping) -> RankDecay:
    """When the branch shrinks, from the `quant` and `train` sections."""
    quant, steps = config["quant"], config["train"]["steps"]
    shape, order = quant["decay_shape"], quant["decay_order"]
    phase = phase_steps_for(steps, quant["decay_fraction"], quant["rank"], quant["shrink"], shape)
    return RankDecay(phase, quant["rank"], quant["shrink"], shape, order, quant["refactor"])


def tail_start(config: Mapping) -> int:
    """Where a constant tail of the learning rates begins: where the branch ends, or would."""
    return int(config["train"]["steps"] * config["quant"]["decay_fraction"])


def make_recipe(
    config: Mapping, model: TransformerConfig, scheduler: Scheduler, *, branch: bool
) -> Recipe:
    """Everything static of the run, with the low-rank branch or, at rank 0, without it."""
    quant, dtype = quant_config(config["quant"], model), jnp.dtype(config["compute_dtype"])
    remat = config["train"]["remat"]
    return Recipe(
        student=student_definition(model, quant, dtype, branch=branch, remat=remat),
        teacher=teacher_definition(model, dtype),
        decay=rank_decay(config),
        optimizer=make_optimizer(config["train"], tail_start(config)),
        noising=training_noise(scheduler, config["train"]),
        temporal_patch=model.patch_size[0],
        train=config["train"],
        tail=tail_start(config),
    )


def initial_state(
    config: Mapping,
    model: TransformerConfig,
    teacher: dict,
    activations: Mapping[str, jax.Array] | None = None,
) -> dict:
    """The student at step 0: the teacher's weights, searched scales, and Phi as their error.

    `activations` are what `activation_maxima` measures; needed where the run smooths.
    """
    quant = quant_config(config["quant"], model)
    params, levels = quantize_params(teacher, quantizable(model), quant, activations)
    if config["quant"]["decay_order"] == "largest":
        params = on_every_branch(params, lambda left, right: reverse(left, right, quant.rank))
    optimizer = make_optimizer(config["train"], tail_start(config))
    return create_state(params, levels, optimizer, average=config["train"]["ema_decay"] > 0)


def newest_state(
    config: Mapping, model: TransformerConfig, teacher: dict, manager: ocp.CheckpointManager
) -> dict | None:
    """The newest checkpoint's state; None where there is no checkpoint yet."""
    step = manager.latest_step()
    if step is None:
        return None
    like = jax.eval_shape(lambda: initial_state(config, model, teacher, unmeasured(model, teacher)))
    if not has_branch(rank_decay(config), step):
        like = {**like, "params": drop_branch(like["params"]), "opt": drop_branch(like["opt"])}
    return checkpoint.restore(manager, step, like)


def compile_step(recipe: Recipe) -> Callable:
    """The jitted update; its first argument's buffers are reused."""
    return jax.jit(partial(train_step, recipe=recipe), donate_argnums=0)


def log_line(metrics: Mapping, params: Mapping, spectrum: bool, steps_per_second: float) -> dict:
    """What is written about a step: plain floats, and what the branch's spectrum is if asked."""
    line = {name: float(value) for name, value in metrics.items()}
    if spectrum:
        line["small_singular_share"] = float(_small_share(params))
    return {**line, "steps_per_second": round(steps_per_second, 3)}


_small_share = jax.jit(small_singular_share)


class _Pace:
    """Steps per second since the last `restart`; the first answer includes compiling."""

    def __init__(self, step: int):
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.perf_counter()

    def __call__(self, step: int) -> float:
        return (step - self._step) / (time.perf_counter() - self._time)


def run_steps(
    config: Mapping,
    workdir: Path,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
) -> dict:
    """Train from wherever the workdir stands to `train.steps`; the final state, at rank 0."""
    train = config["train"]
    # Leaving the block, also by an interruption, waits until the last save is complete.
    with checkpoint.open_checkpoints(workdir, train["keep_checkpoints"]) as manager:
        state = newest_state(config, model, teacher, manager)
        if state is None:
            activations = activation_maxima(config, model, scheduler, teacher, dataset)
            state = checkpoint.committed(initial_state(config, model, teacher, activations))
        writer = MetricWriter(
            workdir, int(state["step"]), train["steps"], train["wandb_project"], "train"
        )
        with writer:
            state = _steps(config, state, model, scheduler, teacher, dataset, writer, manager)
    decay, moments = rank_decay(config), config["quant"]["branch_moments"]
    return enter_step(state, train["steps"], decay, moments)


def _steps(
    config: Mapping,
    state: dict,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    writer: MetricWriter,
    manager: ocp.CheckpointManager,
) -> dict:
    """From the state's step to the last."""
    train, decay, start = config["train"], rank_decay(config), int(state["step"])
    empty_text, seed = jnp.asarray(dataset.empty_text_embeds), jnp.int32(config["seed"])
    data = batches(dataset, seed=config["seed"], batch_size=train["batch_size"], start_step=start)
    compiled: dict[bool, Callable] = {}
    pace = _Pace(start)
    for step in range(start, train["steps"]):
        state = enter_step(state, step, decay, config["quant"]["branch_moments"])
        branch = has_branch(decay, step + 1)
        if branch not in compiled:
            compiled[branch] = compile_step(make_recipe(config, model, scheduler, branch=branch))
        state, metrics = compiled[branch](state, next(data), teacher, empty_text, seed)
        done = step + 1
        writer.advance(done)
        if done % train["log_every"] == 0 or done == train["steps"]:
            jax.block_until_ready(metrics)
            rate, spectrum = pace(done), branch and train["log_spectrum"]
            writer.write(step, log_line(metrics, state["params"], spectrum, rate))
            pace.restart(done)  # What logging takes, its SVDs above all, is no step's.
        if done % train["checkpoint_every"] == 0 or done == train["steps"]:
            checkpoint.save(manager, state)
    return state


def load_model(config: Mapping, shardings: Shardings = None) -> Pipeline:
    """The full-precision pipeline; its text encoder is on the devices only while it encodes.

    Args:
        config: the run's.
        shardings: of the transformer's parameters; see `qvgen_jax.load`.
    """
    return load(
        config["model"],
        shardings=shardings,
        text_weights=config["text_weights"],
        free_text_encoder=True,
    )


def train(config: Mapping, workdir: Path, shardings: Shardings = None) -> tuple[Pipeline, dict]:
    """Train the student of `config` in `workdir`, or continue, or find it done.

    Args:
        config: plain dicts.
        workdir: where the run lives.
        shardings: of the teacher's parameters; the compiler places the student's after them.

    Returns:
        The teacher's pipeline and the student's final state, without a branch.

    Raises:
        UserError: a wrong config, model, data folder, or a workdir of another run.
    """
    check_config(config)
    checkpoint.compare_workdir(workdir, config)
    check_source(config, workdir)
    pipe = load_model(config, shardings)
    model, teacher = pipe.transformer.config, pipe.transformer.states[0]
    check_unguided(config, pipe.defaults["steps"])
    training_noise(pipe.scheduler, config["train"])  # A model of the other family: told now.
    print(describe_layers(model, quant_config(config["quant"], model)), flush=True)
    encoded = ensure_encoded(config, workdir, pipe)
    # Only now: a typo in the model's or the data's path must not mark the workdir as another run's.
    checkpoint.claim_workdir(workdir, config)
    dataset = EncodedDataset(encoded, config["data"]["max_length"])
    return pipe, run_steps(config, workdir, model, pipe.scheduler, teacher, dataset)


def finished_state(
    config: Mapping, workdir: Path, shardings: Shardings = None
) -> tuple[Pipeline, dict]:
    """As `train`, of a run that has ended.

    Raises:
        UserError: there is no such run, or it has not ended.
    """
    steps = config["train"]["steps"]
    check_config(config)
    checkpoint.compare_workdir(workdir, config)
    with checkpoint.open_checkpoints(workdir, config["train"]["keep_checkpoints"]) as manager:
        newest = manager.latest_step()
        if newest != steps:
            stands = "no checkpoint" if newest is None else f"step {newest}"
            raise UserError(
                f"{workdir} has {stands}, needed is the end of training, step {steps}; run the "
                "same command with --job train first"
            )
        pipe = load_model(config, shardings)
        check_unguided(config, pipe.defaults["steps"])
        model, teacher = pipe.transformer.config, pipe.transformer.states[0]
        state = newest_state(config, model, teacher, manager)
    return pipe, enter_step(state, steps, rank_decay(config), config["quant"]["branch_moments"])
