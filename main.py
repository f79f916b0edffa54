"""The one command for all jobs: train, generate, evaluate, serve and the others of `--job`.

    python main.py --config configs/tiny_w4a4.py
    python main.py --config configs/tiny_w4a4.py --config.train.steps=300 --workdir runs/longer
    python main.py --config configs/tiny_w4a4.py --job generate --prompt "a red star moving up ..."
    python main.py --config configs/wan14b_w4a4.py --job plan --target v5p:4x4x4
    python main.py --config configs/wan1_3b_w4a4.py --job vbench --vbench_python vbench/bin/python
    python main.py --config configs/tiny_w4a4.py --job evaluate --export "QVGen=runs/a/export" ...
    python main.py --config configs/tiny_w4a4.py --job quantize --method svdquant
    python main.py --config configs/study_tiny.py --job study --workdir studies/recipe
    python main.py --config configs/tiny_w4a4.py --job serve

The same command again continues an interrupted run. Exit code 2 means that something given to the
program was wrong; the message says what, and nothing was lost.
"""

import os
import shlex
import sys
from functools import partial
from pathlib import Path

from ml_collections import ConfigDict

from qvgen_jax import command_line as given
from qvgen_jax.errors import LostProcess, Preempted, UserError

_VIDEOS = ("videos", "drift_videos")  # Keys of `evaluate` that take prompts.


def default_workdir(config_file: str) -> Path:
    """`runs/tiny_w4a4_full` for `configs/tiny_w4a4.py:full`."""
    path, _, argument = config_file.partition(":")
    return Path("runs") / "_".join(filter(None, [Path(path).stem, argument]))


def run(job: str, config: ConfigDict, workdir: Path) -> None:
    """Do one job. Imports are here so that a wrong flag is told at once."""
    from qvgen_jax import hosts
    from qvgen_jax.quant.bits_file import with_bits_file

    hosts.join()
    if job == "pretrain":
        _pretrain(config, workdir)
        return
    if job == "study":
        _study(config, workdir)
        return
    if "train" not in config:
        raise UserError(
            f"--job {job} needs a config with a train section, not one of pretraining or a study"
        )
    plain = with_bits_file(config.to_dict())
    if job == "plan":
        from qvgen_jax.plan.job import run_plan

        print(run_plan(plain, given.TARGET.value, given.COMPILE.value, given.PLAN_JSON.value))
        return
    plain["command"] = f"python {shlex.join(sys.argv)}"
    if job == "encode":
        _encode(plain, workdir)
    elif job == "generate":
        from qvgen_jax.evaluation.samples import generate_files

        for path in generate_files(plain, workdir, given.PROMPT.value, given.SEED.value):
            print(path)
    elif job == "sensitivity":
        from qvgen_jax.mixed.sensitivity_job import run_sensitivity

        how = (given.CANDIDATES.value, given.TIMESTEPS.value, given.CLIPS.value)
        print(run_sensitivity(plain, workdir, *how))
    elif job == "mixed":
        from qvgen_jax.mixed.plan_job import run_mixed

        how = (given.BUDGET.value, given.SEGMENTS.value, given.TARGET.value, given.MEASURE.value)
        print(run_mixed(plain, workdir, *how))
    elif job == "serve":
        from qvgen_jax.serve.job import serve

        serve(plain, workdir, given.HOST.value, given.PORT.value)
    elif job == "vbench":
        from qvgen_jax.evaluation.vbench_job import run_vbench
        from qvgen_jax.training.check import check_config

        check_config(plain)
        how = {
            "info": given.VBENCH_INFO.value,
            "python": given.VBENCH_PYTHON.value,
            "smoke": given.SMOKE.value,
            "second": given.VBENCH_2.value,
            "dimensions": given.DIMENSIONS.value,
            "part": given.PART.value,
        }
        print(run_vbench(plain, workdir, **how))
    elif job == "quantize":
        _quantize(plain, workdir)
    elif job == "evaluate" and given.EXPORT.value:
        from qvgen_jax.evaluation.evaluate_job import run_evaluate

        print(run_evaluate(plain, workdir, given.EXPORT.value, given.PART.value))
    else:
        _train_and_finish(job, plain, workdir)


def _pretrain(config: ConfigDict, workdir: Path) -> None:
    from convert.save import save_pipeline
    from qvgen_jax.training.pretrain import pretrain

    if "flow" not in config:
        raise UserError("--job pretrain needs a config such as configs/tiny_pretrain.py")
    pipe, flow = pretrain(config.to_dict(), workdir), config.flow
    save_pipeline(
        workdir / "pipeline",
        transformer=(pipe.transformer.config, pipe.transformer.states[0]),
        vae=(pipe.vae.config, pipe.vae.states[0]),
        text_encoder=(pipe.text_encoder.config, pipe.text_encoder.states[0]),
        tokenizer_folder=Path(flow.architecture) / "tokenizer",
        generation_config=flow.generation.to_dict(),
        dtype="float16",
    )
    print(f"pipeline: {workdir / 'pipeline'}")


def _study(config: ConfigDict, workdir: Path) -> None:
    from qvgen_jax.study.job import run_study

    if "variants" not in config:
        raise UserError("--job study needs a grid of runs such as configs/study_tiny.py")
    print(f"tables and figures: {run_study(config.to_dict(), workdir)}")


def _encode(config: dict, workdir: Path) -> None:
    from qvgen_jax.data.prepare import (
        check_held_out,
        check_sizes,
        check_source,
        ensure_encoded,
        ensure_held_out,
    )
    from qvgen_jax.training.check import check_config
    from qvgen_jax.training.run import load_model

    check_config(config)
    if config["data"]["on_the_fly"]:
        raise UserError("data.on_the_fly encodes nothing beforehand: leave it out for --job encode")
    check_source(config, workdir)
    check_held_out(config, workdir)
    pipe = load_model(config)
    check_sizes(config, pipe)
    print(f"encoded clips: {ensure_encoded(config, workdir, pipe)}")
    if config["evaluate"]["held_out"]:
        print(f"encoded held-out clips: {ensure_held_out(config, workdir, pipe)}")


def _quantize(config: dict, workdir: Path) -> None:
    from convert.export import check_export, export_layers
    from convert.packed import packed_definition
    from qvgen_jax.ptq.job import Exporting, run_quantize

    exporting = Exporting(packed_definition, check_export, export_layers)
    print(f"export: {run_quantize(config, workdir, given.METHOD.value or '', exporting)}")


def _train_and_finish(job: str, config: dict, workdir: Path) -> None:
    """`train` does all of it; `export` and `evaluate` need a finished run and do their part."""
    from convert.export import export_pipeline
    from convert.packed import layer_names
    from qvgen_jax.data.prepare import check_held_out
    from qvgen_jax.evaluation.asked import parse_part
    from qvgen_jax.evaluation.finish import compare_and_report
    from qvgen_jax.evaluation.samples import read_prompts
    from qvgen_jax.evaluation.validate import validation
    from qvgen_jax.hosts import everywhere, is_alone, is_first
    from qvgen_jax.training.run import finished_state, train
    from qvgen_jax.training.state import exported_params
    from qvgen_jax.training.student import quant_config

    part = parse_part(given.PART.value if job == "evaluate" else "0/1")
    counts = config["sample"]["count"], *(config["evaluate"][key] for key in _VIDEOS)
    if count := max(*counts, config["train"].get("validate_videos", 0)):
        read_prompts(config["sample"]["prompts"], count)  # Told before training.
    check_held_out(config, workdir)
    if job == "train":
        pipe, state = train(config, workdir, partial(validation, names_of=layer_names))
    else:
        pipe, state = finished_state(config, workdir)
    export = workdir / "export"
    if job != "evaluate" or not (export / "model_index.json").is_file():
        model = pipe.transformer.config
        quant = quant_config(config["quant"], model)
        params, levels = everywhere((exported_params(state), state["levels"]))
        if is_first():
            export_pipeline(
                config["model"],
                export,
                model,
                params,
                quant,
                generation={"unguided_steps": config["sample"]["unguided_steps"]},
                levels=levels,
            )
            print(f"export: {export}")
    if job != "export" and is_alone():
        if report := compare_and_report(config, workdir, pipe, part):
            print(f"report: {report}")
        else:
            print(f"part {part[0]} of {part[1]} is done; the one that ends last writes the report")
    elif is_first():
        print("no report over several processes: `--job evaluate` in one process makes it")


def _pushed(workdir: Path, *, last: bool = False) -> None:
    """See `storage.push`."""
    if given.WORKDIR.value:
        from qvgen_jax import storage

        storage.push(workdir, last=last)


def _lost(error: LostProcess) -> int:
    """Print and leave at once: JAX's own shutdown would wait for the process that is gone."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    os._exit(75)


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 wrong input (one message on stderr), 75 told to stop by SIGTERM, or
    another process of the run is gone (start it, or them all, again), 130 interrupted."""
    try:
        config = given.parse(argv, __doc__)
        workdir = default_workdir(given.config_file())
        if given.WORKDIR.value:
            from qvgen_jax import storage  # Imports JAX: not for a wrong flag.

            workdir = storage.workdir(given.WORKDIR.value)
        elif given.JOB.value == "quantize" and given.METHOD.value:
            workdir = workdir.with_name(f"{workdir.name}_{given.METHOD.value}")
        try:
            run(given.JOB.value, config, workdir)
        except (UserError, Preempted, KeyboardInterrupt):
            _pushed(workdir)
            raise
        _pushed(workdir, last=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except LostProcess as error:
        return _lost(error)
    except Preempted as error:
        print(error, file=sys.stderr)
        return 75
    except RuntimeError as error:
        from qvgen_jax import hosts

        if (lost := hosts.told(error)) is None:
            raise
        return _lost(lost)
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
