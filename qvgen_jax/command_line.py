"""What the program is asked: its options, the config file and what overrides it.

One clear message for a wrong word; nothing here imports JAX, so that it comes at once.
"""

import re
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from qvgen_jax.errors import UserError

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

CONFIG = config_flags.DEFINE_config_file("config", None, "a file of configs/, file.py[:argument]")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "where the run lives, a folder or gs://...; runs/<config name> if absent"
)
JOB = flags.DEFINE_enum("job", "train", JOBS, "what to do")
PROMPT = flags.DEFINE_multi_string("prompt", [], "generate: a prompt; may be repeated")
SEED = flags.DEFINE_integer("seed", 0, "generate: the seed of the noise", lower_bound=0)
TARGET = flags.DEFINE_string(
    "target", "", "plan, mixed: chips: v5p:4x4x4, 2xv6e:16x16, h200:8; else these"
)
COMPILE = flags.DEFINE_bool("compile", True, "plan: ask the target's compiler, if it is installed")
VBENCH_INFO = flags.DEFINE_string("vbench_info", "", "vbench: its VBench_full_info.json")
VBENCH_PYTHON = flags.DEFINE_string("vbench_python", "", "vbench: of its environment, to score")
VBENCH_2 = flags.DEFINE_bool("vbench2", False, "vbench: VBench-2.0 and its package instead")
DIMENSIONS = flags.DEFINE_string("dimensions", "paper", "vbench: paper, all, or names with commas")
SMOKE = flags.DEFINE_bool("smoke", False, "vbench: two prompts of each folder alone")
EXPORT = flags.DEFINE_multi_string(
    "export", [], "evaluate: NAME=FOLDER to compare; may be repeated; the run's own if absent"
)
METHOD = flags.DEFINE_enum(
    "method",
    None,
    ("rtn", "rtn_search", "smoothquant", "gptq", "vidit_q", "svdquant"),
    "quantize: how, see docs/quantize.md",
)
PART = flags.DEFINE_string(
    "part", "0/1", "vbench, evaluate: i/n, the i-th of n machines at work on a disk"
)
HOST = flags.DEFINE_string("host", "127.0.0.1", "serve: where to listen; 0.0.0.0 for everybody")
PORT = flags.DEFINE_integer("port", 7860, "serve: the port of the page")
CANDIDATES = flags.DEFINE_string(
    "candidates", "w3a3,w4a4,w8a8", "sensitivity: bits to try; w4 or a4 is one operand alone"
)
TIMESTEPS = flags.DEFINE_integer("timesteps", 5, "sensitivity: of the sampler's", lower_bound=1)
CLIPS = flags.DEFINE_integer("clips", 8, "sensitivity: held-out ones if any", lower_bound=1)
BUDGET = flags.DEFINE_string("budget", "", "mixed: such as 5bits, 120MB, 20bops or 350ms")
SEGMENTS = flags.DEFINE_integer(
    "segments", 8, "mixed: stacks of blocks that lie alike, at most", lower_bound=1, upper_bound=8
)
MEASURE = flags.DEFINE_bool("measure", True, "mixed: ask the model what the plan predicts")
PLAN_JSON = flags.DEFINE_string("plan_json", None, "plan: a file to write it to as JSON too")


def parse(argv: list[str], about: str = "") -> ConfigDict:
    """The config with its overrides.

    Args:
        argv: the program and its arguments.
        about: what `--help` says before the list of options.

    Raises:
        UserError: an unknown flag or key, a missing config file, a value of the wrong type.
    """
    if {"--help", "-h", "--helpfull"} & set(argv):
        print(f"{about}\n{flags.FLAGS.module_help(__name__)}")
        raise SystemExit(0)
    try:
        rest = flags.FLAGS(argv)
        config = CONFIG.value
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
    file = config_file()
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


def config_file() -> str:
    """What `--config` names, `file.py[:argument]`."""
    return config_flags.get_config_filename(flags.FLAGS["config"])
