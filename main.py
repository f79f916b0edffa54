"""The one command for all jobs: train, generate, evaluate, serve and the others of `JOBS`.

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
import re
import shlex
import sys
import traceback
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from qvgen_jax.errors import LostProcess, Preempted, UserError

JOBS = (
    "train",
    "pretrain",
    "encode",
    "generate",
    "evaluate",
    "export",
    "quantize",
    "study",
    "plan",
    "sensitivity",
    "mixed",
    "vbench",
    "serve",
)
_VIDEOS = ("videos", "drift_videos")  # Keys of `evaluate` that take prompts.

_CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/, file.py[:argument]")
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run lives, a folder or gs://...; runs/<config name> if absent"
)
_JOB = flags.DEFINE_enum("job", "train", JOBS, "what to do")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be repeated")
_SEED = flags.DEFINE_integer("seed", 0, "generate: the seed of the noise", lower_bound=0)
_TARGET = flags.DEFINE_string(
    "target", "", "plan, mixed: chips such as v5p:4x4x4 or h200:8; else these"
)
_COMPILE = flags.DEFINE_bool("compile", True, "plan: ask the target's compiler, if it is installed")
_VBENCH_INFO = flags.DEFINE_string("vbench_info", "", "vbench: its VBench_full_info.json")
_VBENCH_PYTHON = flags.DEFINE_string("vbench_python", "", "vbench: of its environment, to score")
_VBENCH_2 = flags.DEFINE_bool("vbench2", False, "vbench: VBench-2.0 and its package instead")
_DIMENSIONS = flags.DEFINE_string("dimensions", "paper", "vbench: paper, all, or names with commas")
_SMOKE = flags.DEFINE_bool("smoke", False, "vbench: two prompts of each folder alone")
_EXPORT = flags.DEFINE_multi_string(
    "export", [], "evaluate: NAME=FOLDER to compare; may be repeated; the run's own if absent"
)
_METHOD = flags.DEFINE_enum(
    "method",
    None,
    ("rtn", "rtn_search", "smoothquant", "gptq", "vidit_q", "svdquant"),
    "quantize: how, see docs/quantize.md",
)
_PART = flags.DEFINE_string(
    "part", "0/1", "vbench, evaluate: i/n, the i-th of n machines at work on a disk"
)
_HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: where to listen; 0.0.0.0 for everybody")
_PORT = flags.DEFINE_integer("port", 7860, "serve: the port of the page")
_CANDIDATES = flags.DEFINE_string(
    "candidates", "w3a3,w4a4,w8a8", "sensitivity: bits to try; w4 or a4 is one operand alone"
)
_TIMESTEPS = flags.DEFINE_integer("timesteps", 5, "sensitivity: of the sampler's", lower_bound=1)
_CLIPS = flags.DEFINE_integer("clips", 8, "sensitivity: held-out ones if any", lower_bound=1)
_BUDGET = flags.DEFINE_string("budget", "", "mixed: such as 5bits, 120MB, 20bops or 350ms")
_SEGMENTS = flags.DEFINE_integer(
    "segments", 8, "mixed: stacks of blocks that lie alike, at most", lower_bound=1, upper_bound=8
)
_MEASURE = flags.DEFINE_bool("measure", True, "mixed: ask the model what the plan predicts")
_PLAN_JSON = flags.DEFINE_string("plan_json", None, "plan: a file to write it to as JSON too")


def parse(argv: list[str]) -> ConfigDict:
    """The config with its overrides.

    Raises:
        UserError: an unknown flag or key, a missing config file, a value of the wrong type.
    """
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(f"{__doc__}\n{flags.FLAGS.main_module_help()}")
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv)
        config = _CONFIG.value
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_key(argv, str(error.args[0]))) from error
    except (flags.Error, OSError, TypeError, ValueError) as error:
        # ml_collections wraps a config file's own error in its whole traceback.
        text = _shortened(" ".join(str(error).strip().splitlines()[-1:]))
        if "--" not in text and any(word.startswith("--config.") for word in argv):
            text = f"an override names no key of the config, or not as sections.key ({text})"
        raise UserError(f"{text}; see `python main.py --help`") from error
    except Exception as error:  # A config file is a program, and may raise anything.
        line = traceback.extract_tb(error.__traceback__)[-1]
        where = "" if isinstance(error, SyntaxError) else f" ({line.filename}, line {line.lineno})"
        raise UserError(
            f"the config file does not run: {type(error).__name__}: "
            f"{_shortened(str(error))}{where}; mend it there"
        ) from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: every option starts with --")
    names = ", ".join(sorted(str(path) for path in Path("configs").glob("[a-z]*.py")))
    if config is None:
        raise UserError(f"no --config: name a config file, one of {names or 'configs/*.py'}")
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    if not Path(file.partition(":")[0]).is_file():
        raise UserError(f"config file {file!r} does not exist; there are {names or 'none here'}")
    if not isinstance(config, ConfigDict):
        raise UserError(f"{file}: get_config() gave a {type(config).__name__}, not a ConfigDict")
    return config


def _shortened(text: str) -> str:
    return text if len(text) <= 1000 else f"{text[:1000]}..."


def _unknown_key(argv: list[str], text: str) -> str:
    """A sentence for a misspelt override; ml_collections' text may hold the nearest right key."""
    if "get_config" in text:
        return f"--config names a file without a function get_config() ({_shortened(text)})"
    if not re.search(r"\w+", text):
        return f"an override names no key of the config ({text!r}); see `python main.py --help`"
    key = re.search(r"\w+", text.replace("\\n", " ")).group()
    given = next((word for word in argv if key in word and word.startswith("--")), key)
    nearest = re.search(r'Did you mean "(\w+)"', text)
    hint = f"; did you mean {nearest.group(1)!r}?" if nearest else ""
    return _shortened(f"{given}: the config has no key {key!r}{hint}")


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

        print(run_plan(plain, _TARGET.value, _COMPILE.value, _PLAN_JSON.value))
        return
    plain["command"] = f"python {shlex.join(sys.argv)}"
    if job == "encode":
        _encode(plain, workdir)
    elif job == "generate":
        from qvgen_jax.evaluation.samples import generate_files

        for path in generate_files(plain, workdir, _PROMPT.value, _SEED.value):
            print(path)
    elif job == "sensitivity":
        from qvgen_jax.mixed.sensitivity_job import run_sensitivity

        how = (_CANDIDATES.value, _TIMESTEPS.value, _CLIPS.value)
        print(run_sensitivity(plain, workdir, *how))
    elif job == "mixed":
        from qvgen_jax.mixed.plan_job import run_mixed

        how = (_BUDGET.value, _SEGMENTS.value, _TARGET.value, _MEASURE.value)
        print(run_mixed(plain, workdir, *how))
    elif job == "serve":
        from qvgen_jax.serve.job import serve

        serve(plain, workdir, _HOST.value, _PORT.value)
    elif job == "vbench":
        from qvgen_jax.evaluation.vbench_job import run_vbench
        from qvgen_jax.training.check import check_config

        check_config(plain)
        how = {"info": _VBENCH_INFO.value, "python": _VBENCH_PYTHON.value, "smoke": _SMOKE.value}
        how["second"] = _VBENCH_2.value
        print(run_vbench(plain, workdir, **how, dimensions=_DIMENSIONS.value, part=_PART.value))
    elif job == "quantize":
        _quantize(plain, workdir)
    elif job == "evaluate" and _EXPORT.value:
        from qvgen_jax.evaluation.evaluate_job import run_evaluate

        print(run_evaluate(plain, workdir, _EXPORT.value, _PART.value))
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
    print(f"export: {run_quantize(config, workdir, _METHOD.value or '', exporting)}")


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

    part = parse_part(_PART.value if job == "evaluate" else "0/1")
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
    if _WORKDIR.value:
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
        config = parse(argv)
        file = config_flags.get_config_filename(flags.FLAGS["config"])
        workdir = default_workdir(file)
        if _WORKDIR.value:
            from qvgen_jax import storage  # Imports JAX: not for a wrong flag.

            workdir = storage.workdir(_WORKDIR.value)
        elif _JOB.value == "quantize" and _METHOD.value:
            workdir = workdir.with_name(f"{workdir.name}_{_METHOD.value}")
        try:
            run(_JOB.value, config, workdir)
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
