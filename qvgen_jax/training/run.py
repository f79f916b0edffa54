"""A whole run: from a config and a workdir to the teacher's pipeline and the student's state."""

import contextlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from qvgen_jax import hosts, sharding
from qvgen_jax.data.prepare import check_sizes, check_source, read_dataset
from qvgen_jax.diffusion.noising import training_noise
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import mesh_of_config, told
from qvgen_jax.pipeline import Pipeline, load
from qvgen_jax.placement import Shardings
from qvgen_jax.training import checkpoint
from qvgen_jax.training.check import check_config, check_unguided
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.lock import alone_in
from qvgen_jax.training.loop import Validate, best_state, newest_state, rank_decay, run_steps
from qvgen_jax.training.state import enter_step
from qvgen_jax.training.student import describe_layers, quant_config
from qvgen_jax.training.teacher import as_held, byte_linears, teacher_definition

Validation = Callable[[Mapping, Path, Pipeline], Validate]


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


def train(
    config: Mapping, workdir: Path, validation: Validation | None = None
) -> tuple[Pipeline, dict]:
    """Train the student of `config` in `workdir`, or continue, or find it done.

    Args:
        config: plain dicts.
        workdir: where the run lives.
        validation: of config, workdir and the teacher's pipeline: the function that validates a
            student. Needed where the config validates.

    Returns:
        The teacher's pipeline, in full precision where one process trained, and the student's final
        state, without a branch.

    Raises:
        UserError: a wrong config, model, data folder, or a workdir of another run.
    """
    check_config(config)
    _check_processes(config)
    checkpoint.compare_workdir(workdir, config)
    with contextlib.ExitStack() as held:
        new = not checkpoint.is_claimed(workdir)
        if not new:  # A new one is touched only when the config has proved good.
            held.enter_context(alone_in(workdir))
        mesh = mesh_of_config(config)
        check_source(config, workdir)
        pipe = load_model(config, over_mesh(mesh))
        model, teacher = pipe.transformer.config, pipe.transformer.states[0]
        check_unguided(config, pipe.defaults["steps"])
        check_sizes(config, pipe)
        training_noise(pipe.scheduler, config["train"])  # A model of the other family: told now.
        if hosts.is_first():
            print(describe_layers(model, quant_config(config["quant"], model)), flush=True)
            if mesh is not None:
                print(told(mesh), flush=True)
        if new:
            held.enter_context(alone_in(workdir))
        dataset = read_dataset(config, workdir, pipe)
        # Only now: a typo in the model's or the data's path must not mark it as another run's.
        checkpoint.claim_workdir(workdir, config)
        hosts.barrier("workdir claimed")
        validate = None
        if config["train"]["validate_every"]:
            validate = validation(config, workdir, pipe)
        arguments = (model, pipe.scheduler, teacher, dataset, mesh, validate)
        state, teacher = run_steps(config, workdir, *arguments)
        in_bytes = byte_linears(config["train"], model)
        if in_bytes and hosts.is_alone():  # What follows compares with full precision.
            del teacher, arguments, validate, pipe
            pipe, in_bytes = load_model(config, over_mesh(mesh)), ()
            teacher = as_held(pipe.transformer.states[0], jnp.dtype(config["compute_dtype"]))
    return _holding(config, pipe, teacher, in_bytes), state


def _check_processes(config: Mapping) -> None:
    every = config["train"]["validate_every"]
    if every and not hosts.is_alone():
        raise UserError(
            f"--config.train.validate_every={every} is for runs of one process, which may have any "
            "number of devices; set it to 0, and judge the export with --job evaluate"
        )


def _holding(
    config: Mapping, pipe: Pipeline, teacher: dict, in_bytes: Collection[str] = ()
) -> Pipeline:
    """The pipeline with a held teacher, computing in training's type; see `as_held`."""
    definition = teacher_definition(
        pipe.transformer.config, jnp.dtype(config["compute_dtype"]), in_bytes
    )
    return pipe.with_transformer(definition, teacher)


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
        if config["train"]["export_best"]:
            state = best_state(config, workdir, model, teacher, checkpoints, mesh)
        else:
            state = newest_state(config, model, teacher, checkpoints, mesh)
    pipe = _holding(config, pipe, as_held(teacher, jnp.dtype(config["compute_dtype"])))
    return pipe, enter_step(state, steps, rank_decay(config), config["quant"]["branch_moments"])
