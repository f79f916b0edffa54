"""The training run: from a config and a workdir to the trained student's state."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qvgen_jax import hosts, sharding, storage
from qvgen_jax.data.dataset import EncodedDataset
from qvgen_jax.data.prepare import check_source, ensure_encoded
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import mesh_of_config, told
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.pipeline import Pipeline, load
from qvgen_jax.placement import Shardings
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.low_rank import drop_branch, on_every_branch, reverse, small_singular_share
from qvgen_jax.quant.schedule import RankDecay, boundaries, phase_steps_for
from qvgen_jax.training import checkpoint
from qvgen_jax.training.calibrate import activation_maxima, unmeasured
from qvgen_jax.training.check import check_config, check_unguided
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.feed import feed
from qvgen_jax.training.guard import Alarms, NotFinite, check
from qvgen_jax.training.lock import alone_in
from qvgen_jax.training.metrics import MetricWriter, Silent, metric_writer
from qvgen_jax.training.optimizer import make_optimizer
from qvgen_jax.training.pace import Pace, work_of
from qvgen_jax.training.profile import Profile
from qvgen_jax.training.state import create_state, enter_step, has_branch
from qvgen_jax.training.step import Recipe, train_step
from qvgen_jax.training.stop import Stop
from qvgen_jax.training.student import (
    as_held,
    describe_layers,
    quant_config,
    student_definition,
    teacher_definition,
)
from qvgen_jax.training.watchdog import Watchdog


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
    mesh: Mesh | None = None,
) -> dict:
    """The student at step 0: the teacher's weights, searched scales, and Phi as their error.

    `activations` are what `activation_maxima` measures; needed where the run smooths. Over a mesh
    every layer is searched where its slices lie, one after the other.
    """
    quant = quant_config(config["quant"], model)
    params, levels = quantize_params(teacher, quantizable(model), quant, activations)
    if config["quant"]["decay_order"] == "largest":
        params = on_every_branch(params, lambda left, right: reverse(left, right, quant.rank))
    optimizer = make_optimizer(config["train"], tail_start(config))
    average = config["train"]["ema_decay"] > 0

    def create(params: dict, levels: dict) -> dict:
        return create_state(params, levels, optimizer, average=average)

    if mesh is None:
        return create(params, levels)
    params, levels = sharding.place(params, mesh), sharding.place(levels, mesh)
    places = sharding.shard(jax.eval_shape(create, params, levels), mesh)
    return jax.jit(create, out_shardings=places)(params, levels)


def newest_state(
    config: Mapping,
    model: TransformerConfig,
    teacher: dict,
    checkpoints: Checkpoints,
    mesh: Mesh | None = None,
) -> dict | None:
    """The newest good checkpoint's state, each host's slices of it; None where there is none yet.

    Raises:
        UserError: see `Checkpoints.newest`.
    """

    def like_of(step: int) -> dict:
        like = jax.eval_shape(
            lambda: initial_state(config, model, teacher, unmeasured(model, teacher))
        )
        if not has_branch(rank_decay(config), step):
            like = {**like, "params": drop_branch(like["params"]), "opt": drop_branch(like["opt"])}
        return sharding.described(like, mesh)

    return checkpoints.newest(like_of)


def compile_step(recipe: Recipe, places: dict | None = None) -> Callable:
    """The jitted update; its first argument's buffers are reused.

    Args:
        recipe: of the run.
        places: where the new state's arrays shall lie; None leaves it to the compiler.
    """
    how = {} if places is None else {"out_shardings": (places, None)}
    return jax.jit(partial(train_step, recipe=recipe), donate_argnums=0, **how)


def log_line(metrics: Mapping, params: Mapping, spectrum: bool, speed: Mapping) -> dict:
    """What is written about a step: plain floats, and what the branch's spectrum is if asked."""
    line = {name: float(value) for name, value in metrics.items() if not value.ndim}
    if spectrum:
        line["small_singular_share"] = float(_small_share(params))
    return {**line, **speed}


_small_share = jax.jit(small_singular_share)


def run_steps(
    config: Mapping,
    workdir: Path,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    mesh: Mesh | None = None,
) -> tuple[dict, dict]:
    """Train from wherever the workdir stands to `train.steps`.

    Returns:
        The final state, at rank 0, and the teacher as the steps held it, see `as_held`: what it
        gave up of the one that came in is deleted.
    """
    train = config["train"]
    always = boundaries(rank_decay(config), train["steps"])
    with (
        sharding.under(mesh),
        Checkpoints(workdir, train["keep_checkpoints"], always) as checkpoints,
    ):
        state = newest_state(config, model, teacher, checkpoints, mesh)
        if state is None:
            activations = activation_maxima(config, model, scheduler, teacher, dataset, mesh)
            state = initial_state(config, model, teacher, activations, mesh)
            state = checkpoint.committed(state)
        teacher = as_held(teacher, jnp.dtype(config["compute_dtype"]))
        parts = (model, scheduler, teacher, dataset, checkpoints, mesh)
        while True:
            try:
                state = _run_from(config, workdir, state, *parts)
                break
            except NotFinite as bad:
                state = _gone_back(
                    config, bad, newest_state(config, *parts[:1], teacher, *parts[4:])
                )
        decay, moments = rank_decay(config), config["quant"]["branch_moments"]
        state = sharding.place(enter_step(state, train["steps"], decay, moments), mesh)
    return state, teacher


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


def _run_from(
    config: Mapping,
    workdir: Path,
    state: dict,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
) -> dict:
    """The last state of `train.steps`, with everything that goes on beside the steps."""
    train, start = config["train"], int(state["step"])
    writer = metric_writer(workdir, start, train["steps"], train["wandb_project"], "train")
    profile = Profile(workdir / "profile", start, train["profile_steps"])
    with writer, profile, Stop() as stop, Watchdog(train["hang_minutes"]) as watchdog:
        arguments = (model, scheduler, teacher, dataset, writer, profile, checkpoints, mesh)
        return _steps(config, workdir, state, *arguments, stop, watchdog)


def _steps(
    config: Mapping,
    workdir: Path,
    state: dict,
    model: TransformerConfig,
    scheduler: Scheduler,
    teacher: dict,
    dataset: EncodedDataset,
    writer: MetricWriter | Silent,
    profile: Profile,
    checkpoints: Checkpoints,
    mesh: Mesh | None,
    stop: Stop,
    watchdog: Watchdog,
) -> dict:
    """From the state's step to the last."""
    train, decay, start = config["train"], rank_decay(config), int(state["step"])
    empty_text, seed = jnp.asarray(dataset.empty_text_embeds), jnp.int32(config["seed"])
    if mesh is not None:
        empty_text, seed = jax.device_put((empty_text, seed), sharding.whole(mesh))
    milestones = boundaries(decay, train["steps"])
    data = feed(dataset, config, start, mesh, int(state["order"]))
    alarms = Alarms()
    compiled: dict[bool, Callable] = {}
    pace = Pace(start, work_of(config, model, dataset[0]["latent_mean"].shape))
    for step in range(start, train["steps"]):
        profile.before(step)
        entered = enter_step(state, step, decay, config["quant"]["branch_moments"])
        if entered is not state:  # A boundary: what was refactored goes back to its place.
            state = sharding.place(entered, mesh)
        branch = has_branch(decay, step + 1)
        if branch not in compiled:
            recipe = make_recipe(config, model, scheduler, branch=branch)
            places = None if mesh is None else sharding.shard(state, mesh)
            compiled[branch] = compile_step(recipe, places)
        state, metrics = compiled[branch](state, next(data), teacher, empty_text, seed)
        done = step + 1
        writer.advance(done)
        watchdog.fed()
        if done % train["log_every"] == 0 or done == train["steps"]:
            jax.block_until_ready(metrics)
            speed, spectrum = pace(done), branch and train["log_spectrum"]
            writer.write(step, log_line(metrics, state["params"], spectrum, speed))
            for told in alarms.told(float(metrics["loss"]), float(metrics["motion"])):
                writer.warn(step, told)
            check(state, metrics, train["most_skipped"])
            pace.restart(done)  # What logging takes, its SVDs above all, is no step's.
        stopping = stop.asked(done)
        due = done % train["checkpoint_every"] == 0 or done == train["steps"]
        if due or done in milestones or stopping:
            # Not while updates are skipped: what the run would go back to is the one before.
            if done == train["steps"] or not int(state["skipped"]["in_a_row"]):
                checkpoints.save(state)
            storage.push(workdir)
        if stopping:
            checkpoints.finish()
            stop.leave(done)
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


def over_mesh(mesh: Mesh | None) -> Shardings:
    """The teacher's shardings, for `load_model`."""
    return None if mesh is None else partial(sharding.shard, mesh=mesh)


def train(config: Mapping, workdir: Path) -> tuple[Pipeline, dict]:
    """Train the student of `config` in `workdir`, or continue, or find it done.

    Args:
        config: plain dicts.
        workdir: where the run lives.

    Returns:
        The teacher's pipeline and the student's final state, without a branch.

    Raises:
        UserError: a wrong config, model, data folder, or a workdir of another run.
    """
    check_config(config)
    checkpoint.compare_workdir(workdir, config)
    with contextlib.ExitStack() as held:
        new = not workdir.is_dir()
        if not new:  # A new one is made only when the config has proved good.
            held.enter_context(alone_in(workdir))
        mesh = mesh_of_config(config)
        check_source(config, workdir)
        pipe = load_model(config, over_mesh(mesh))
        model, teacher = pipe.transformer.config, pipe.transformer.states[0]
        check_unguided(config, pipe.defaults["steps"])
        training_noise(pipe.scheduler, config["train"])  # A model of the other family: told now.
        if hosts.is_first():
            print(describe_layers(model, quant_config(config["quant"], model)), flush=True)
            if mesh is not None:
                print(told(mesh), flush=True)
        if new:
            held.enter_context(alone_in(workdir))
        encoded = ensure_encoded(config, workdir, pipe)
        # Only now: a typo in the model's or the data's path must not mark it as another run's.
        checkpoint.claim_workdir(workdir, config)
        hosts.barrier("workdir claimed")
        dataset = EncodedDataset(encoded, config["data"]["max_length"])
        state, teacher = run_steps(config, workdir, model, pipe.scheduler, teacher, dataset, mesh)
    return _holding(config, pipe, teacher), state


def _holding(config: Mapping, pipe: Pipeline, teacher: dict) -> Pipeline:
    """The pipeline with the teacher as training held it, computing in the same type."""
    dtype = jnp.dtype(config["compute_dtype"])
    return pipe.with_transformer(teacher_definition(pipe.transformer.config, dtype), teacher)


def finished_state(config: Mapping, workdir: Path) -> tuple[Pipeline, dict]:
    """As `train`, of a run that has ended.

    Raises:
        UserError: there is no such run, or it has not ended.
    """
    steps = config["train"]["steps"]
    check_config(config)
    checkpoint.compare_workdir(workdir, config)
    with Checkpoints(workdir, config["train"]["keep_checkpoints"]) as checkpoints:
        there = checkpoints.steps()
        if there[-1:] != [steps]:
            stands = f"step {there[-1]}" if there else "no checkpoint"
            raise UserError(
                f"{workdir} has {stands}, needed is the end of training, step {steps}; run the "
                "same command with --job train first"
            )
        mesh = mesh_of_config(config)
        pipe = load_model(config, over_mesh(mesh))
        check_unguided(config, pipe.defaults["steps"])
        model, teacher = pipe.transformer.config, pipe.transformer.states[0]
        state = newest_state(config, model, teacher, checkpoints, mesh)
    pipe = _holding(config, pipe, as_held(teacher, jnp.dtype(config["compute_dtype"])))
    return pipe, enter_step(state, steps, rank_decay(config), config["quant"]["branch_moments"])
