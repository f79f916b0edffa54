"""The steps of a run: from wherever its workdir stands to the trained student's state."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qvgen_jax import hosts, sharding, storage
from qvgen_jax.data.dataset import Dataset, steps_by_shape
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import drop_branch, on_every_branch, reverse
from qvgen_jax.quant.schedule import boundaries, gate_at
from qvgen_jax.training import checkpoint
from qvgen_jax.training.best import is_better, keep_best, read_best
from qvgen_jax.training.calibrate import (
    activation_maxima,
    activation_moments,
    unmeasured,
    unmeasured_moments,
)
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.feed import feed
from qvgen_jax.training.guard import Alarms, NotFinite, check
from qvgen_jax.training.metrics import MetricWriter, Silent, log_line, metric_writer
from qvgen_jax.training.optimizer import make_optimizer
from qvgen_jax.training.pace import Pace, mean_work
from qvgen_jax.training.profile import Profile
from qvgen_jax.training.state import create_state, enter_step, exported_params, has_branch
from qvgen_jax.training.step import Recipe, train_step
from qvgen_jax.training.stop import Stop
from qvgen_jax.training.student import quant_config, rank_decay, student_definition, tail_start
from qvgen_jax.training.teacher import byte_linears, held_in_training, teacher_definition
from qvgen_jax.training.validation import Validated
from qvgen_jax.training.watchdog import Watchdog
from qvgen_jax.transformer import Transformer

Validate = Callable[[int, Transformer], Validated]


class Run(NamedTuple):
    """What all steps of a run work with.

    Attributes:
        config, workdir: of the run.
        model: sizes of both networks.
        scheduler: the pipeline's.
        teacher: full-precision parameters, as the steps hold them.
        dataset: the clips.
        checkpoints: the workdir's.
        mesh: None for one device.
        validate: what is found of a student at a step; None where the run does not ask for it.
    """

    config: Mapping
    workdir: Path
    model: TransformerConfig
    scheduler: Scheduler
    teacher: dict
    dataset: Dataset
    checkpoints: Checkpoints
    mesh: Mesh | None
    validate: Validate | None


def make_recipe(
    config: Mapping, model: TransformerConfig, scheduler: Scheduler, *, branch: bool
) -> Recipe:
    """Everything static of the run, with the low-rank branch or, at rank 0, without it."""
    quant, dtype = quant_config(config["quant"], model), jnp.dtype(config["compute_dtype"])
    remat = config["train"]["remat"]
    return Recipe(
        student=student_definition(model, quant, dtype, branch=branch, remat=remat),
        teacher=teacher_definition(model, dtype, byte_linears(config["train"], model)),
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
    mesh: Mesh | None = None,
    moments: Mapping[str, jax.Array] | None = None,
) -> dict:
    """The student at step 0: the teacher's weights, searched scales, and Phi as their error.

    `activations` are what `activation_maxima` measures, needed where the run smooths; `moments`
    what `activation_moments` does, for learned steps. Over a mesh every layer is searched where its
    slices lie, one after the other.
    """
    quant, seed = quant_config(config["quant"], model), config["seed"]
    of_model = (teacher, quantizable(model), quant)
    params, levels = quantize_params(*of_model, activations, moments, seed)
    if config["quant"]["decay_order"] == "largest" and not quant.merged:
        params = on_every_branch(params, lambda left, right: reverse(left, right, quant.rank))
    train, optimizer = config["train"], make_optimizer(config["train"], tail_start(config))
    how = {"average": train["ema_decay"] > 0, "freeze_weights": train["freeze_weights"]}

    def create(params: dict, levels: dict) -> dict:
        return create_state(params, levels, optimizer, **how)

    if mesh is None:
        return create(params, levels)
    params, levels = sharding.place(params, mesh), sharding.place(levels, mesh)
    places = sharding.shard(jax.eval_shape(create, params, levels), mesh)
    return jax.jit(create, out_shardings=places)(params, levels)


def undrawn_state(config: Mapping, model: TransformerConfig, teacher: dict) -> dict:
    """`initial_state` where nothing was measured: for its structure and shapes alone."""
    found = unmeasured(model, teacher), unmeasured_moments(model, teacher)
    return initial_state(config, model, teacher, found[0], moments=found[1])


def newest_state(
    config: Mapping,
    model: TransformerConfig,
    teacher: dict,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
    most: int | None = None,
) -> dict | None:
    """The newest good checkpoint's state, each host's slices of it; None where there is none yet.

    None newer than of step `most`.

    Raises:
        UserError: see `Checkpoints.newest`.
    """

    def like_of(step: int) -> dict:
        like = jax.eval_shape(partial(undrawn_state, config, model), teacher)
        if not has_branch(rank_decay(config), step):
            like = {**like, "params": drop_branch(like["params"]), "opt": drop_branch(like["opt"])}
        return sharding.described(like, mesh)

    return checkpoints.newest(like_of, most)


def compile_step(recipe: Recipe, places: dict | None = None) -> Callable:
    """The jitted update; its first argument's buffers are reused.

    Args:
        recipe: of the run.
        places: where the new state's arrays shall lie; None leaves it to the compiler.
    """
    how = {} if places is None else {"out_shardings": (places, None)}
    return jax.jit(partial(train_step, recipe=recipe), donate_argnums=0, **how)


def run_steps(
    config: Mapping,
    workdir: Path,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: Dataset,
    mesh: Mesh | None = None,
    validate: Validate | None = None,
) -> tuple[dict, dict]:
    """Train from wherever the workdir stands to `train.steps`.

    Args:
        config, workdir, model, scheduler, dataset, mesh: see `Run`.
        teacher: full-precision parameters.
        validate: asked after every `train.validate_every` steps.

    Returns:
        The final state, at rank 0 (a merged adapter stays), and the teacher as the steps held it,
        see `as_held`: what it gave up of the one that came in is deleted.
    """
    train = config["train"]
    always = set(boundaries(rank_decay(config), train["steps"]))
    if best := read_best(workdir):
        always.add(best["step"])
    with (
        sharding.under(mesh),
        Checkpoints(workdir, train["keep_checkpoints"], always) as checkpoints,
    ):
        state = newest_state(config, model, teacher, checkpoints, mesh)
        if state is None:
            of_run = (config, model, scheduler, teacher, dataset, mesh)
            activations, moments = activation_maxima(*of_run), activation_moments(*of_run)
            state = initial_state(config, model, teacher, activations, mesh, moments)
            state = checkpoint.committed(state)
        shapes = jax.eval_shape(lambda x: x, teacher)  # Enough for what is restored from now on.
        teacher = held_in_training(config, model, teacher)
        parts = (scheduler, teacher, dataset, checkpoints, mesh, validate)
        run = Run(config, workdir, model, *parts)
        while True:
            try:
                state = _run_from(run, state)
                break
            except NotFinite as bad:
                state = newest_state(config, model, shapes, checkpoints, mesh)
                state = _gone_back(config, bad, state)
        if train["export_best"]:
            state = best_state(config, workdir, model, shapes, checkpoints, mesh)
        decay, moments = rank_decay(config), config["quant"]["branch_moments"]
        state = sharding.place(enter_step(state, train["steps"], decay, moments), mesh)
    return state, teacher


def best_state(
    config: Mapping,
    workdir: Path,
    model: TransformerConfig,
    teacher: dict,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
) -> dict:
    """The state that did best on held-out clips.

    Raises:
        UserError: none was validated without its branch.
    """
    best = read_best(workdir)
    if best is None or best["step"] not in checkpoints.steps():
        raise UserError(
            f"{workdir} has no best checkpoint: no step without a branch was validated; leave out "
            "--config.train.export_best, or train anew with a smaller train.validate_every"
        )
    return newest_state(config, model, teacher, checkpoints, mesh, best["step"])


def _gone_back(config: Mapping, bad: NotFinite, state: dict | None) -> dict:
    """The state to go on from, with another order of data and noise.

    Raises:
        UserError: there is none, or the run went back too often.
    """
    if state is None or bad.order >= config["train"]["fresh_orders"]:
        raise UserError(
            f"training does not go on: more than {config['train']['most_skipped']} updates in a "
            f"row were not finite, and going back {bad.order} times did not help ({bad}). Lower "
            "train.learning_rate, or raise train.most_skipped; metrics.jsonl has the loss so far"
        ) from bad
    if hosts.is_first():
        print(f"warning: {bad}; back to step {int(state['step'])} with fresh data", flush=True)
    return {
        **state,
        # One more than the order that failed, whatever the checkpoint's: none is tried twice.
        "order": 0 * state["order"] + bad.order + 1,
        "skipped": {**state["skipped"], "in_a_row": 0 * state["order"]},
    }


def _run_from(run: Run, state: dict) -> dict:
    """The last state of `train.steps`, with everything that goes on beside the steps."""
    train, start = run.config["train"], int(state["step"])
    name = train["wandb_project"]
    writer = metric_writer(run.workdir, start, train["steps"], name, "train")
    profile = Profile(run.workdir / "profile", start, train["profile_steps"])
    with writer, profile, Stop() as stop, Watchdog(train["hang_minutes"]) as watchdog:
        return _steps(run, state, writer, profile, stop, watchdog)


def _steps(
    run: Run,
    state: dict,
    writer: MetricWriter | Silent,
    profile: Profile,
    stop: Stop,
    watchdog: Watchdog,
) -> dict:
    """From the state's step to the last."""
    config, workdir, model, mesh = run.config, run.workdir, run.model, run.mesh
    train, decay, start = config["train"], rank_decay(config), int(state["step"])
    empty_text, seed = jnp.asarray(run.dataset.empty_text_embeds), jnp.int32(config["seed"])
    if mesh is not None:
        empty_text, seed = jax.device_put((empty_text, seed), sharding.whole(mesh))
    milestones = boundaries(decay, train["steps"])
    data = feed(run.dataset, config, start, mesh, int(state["order"]))
    alarms, metrics = Alarms(), None
    compiled: dict[bool, Callable] = {}
    pace = Pace(start, mean_work(config, model, steps_by_shape(run.dataset, train["batch_size"])))
    for step in range(start, train["steps"]):
        profile.before(step)
        entered = enter_step(state, step, decay, config["quant"]["branch_moments"])
        if entered is not state:  # A boundary: what was refactored goes back to its place.
            state = sharding.place(entered, mesh)
        branch = has_branch(decay, step + 1)
        if branch not in compiled:
            recipe = make_recipe(config, model, run.scheduler, branch=branch)
            places = None if mesh is None else sharding.shard(state, mesh)
            compiled[branch] = compile_step(recipe, places)
        batch = pace.next_of(data, metrics and metrics["loss"])
        state, metrics = compiled[branch](state, batch, run.teacher, empty_text, seed)
        done, line = step + 1, {}
        writer.advance(done)
        watchdog.fed()
        if done % train["log_every"] == 0 or done == train["steps"]:
            jax.block_until_ready(metrics)
            speed, spectrum = pace(done), branch and train["log_spectrum"]
            line = log_line(metrics, state["params"], spectrum, speed)
        if run.validate is not None and done % train["validate_every"] == 0:
            found = run.validate(step, _student(config, model, state, branch))
            writer.validated(step, found)
            line, loss = {**line, **found.scalars}, found.scalars["held_out_loss"]
            ships = not branch or config["quant"]["branch_space"] == "merged"
            if ships and is_better(workdir, loss):
                keep_best(workdir, run.checkpoints, state, loss)
            watchdog.fed()
        if line:
            writer.write(step, line)
            for told in alarms.told(float(metrics["loss"]), float(metrics["motion"])):
                writer.warn(step, told)
            check(state, metrics, train["most_skipped"])
            pace.restart(done)  # What logging takes, its SVDs above all, is no step's.
        stopping = stop.asked(done)
        due = done % train["checkpoint_every"] == 0 or done == train["steps"]
        if due or done in milestones or stopping:
            # Not while updates are skipped: what the run would go back to is the one before.
            last = done == train["steps"] or stopping
            if last or not int(state["skipped"]["in_a_row"]):
                run.checkpoints.save(state)
            storage.push(workdir)
        if stopping:
            run.checkpoints.finish()
            stop.leave(done)
    return state


def _student(config: Mapping, model: TransformerConfig, state: dict, branch: bool) -> Transformer:
    """The student as it would ship, or, while it has a branch, as it stands."""
    quant, dtype = quant_config(config["quant"], model), jnp.dtype(config["compute_dtype"])
    definition = student_definition(model, quant, dtype, branch=branch)
    params = state["params"] if branch else exported_params(state)
    gate = gate_at(state["step"] - 1, rank_decay(config)) if branch else None
    return Transformer(model, definition, (params, state["levels"]), gate)
