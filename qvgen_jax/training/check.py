"""What can be wrong in a training config and is cheap to see, before anything is loaded."""

from collections.abc import Mapping

from kernels.choose import BACKENDS
from qvgen_jax.data.clips import CROPS, cut_of
from qvgen_jax.errors import UserError
from qvgen_jax.models.remat import POLICIES
from qvgen_jax.quant.bits_file import named_twice
from qvgen_jax.quant.config import ACT_RANGES, BRANCH_SPACES
from qvgen_jax.quant.schedule import phase_steps_for
from qvgen_jax.training.optimizer import GROUPS

_LARGEST = 2**31  # What counts stay below: a step is an int32.
_POSITIVE = (
    "train.steps",
    "train.batch_size",
    "train.accumulate",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "data.num_frames",
    "data.height",
    "data.width",
    "data.max_length",
    "data.clips_per_video",
    "data.encode_batch_size",
    "sample.batch_size",
    "calibration.count",
    "calibration.steps",
    "calibration.every",
    "calibration.batch_size",
    "calibration.rows",
    "calibration.rank",
    "calibration.branch_iterations",
)
# What 0 leaves out.
_OPTIONAL = {
    "sample.count": "pairs of videos",
    "train.profile_steps": "trace",
    "train.most_skipped": "skipped update",
    "train.fresh_orders": "way back",
    "train.validate_every": "validation",
    "train.validate_videos": "videos of the student while it trains",
    "evaluate.videos": "evaluation",
    "evaluate.shown": "videos in the report",
    "evaluate.drift_videos": "drift",
}
_CHOICES = {
    "calibration.by_activity": (False, True),
    "calibration.rounding": ("", "nearest", "gptq"),
    "compute_dtype": ("float32", "bfloat16"),
    "data.crop": CROPS,
    "kernels": ("auto", *BACKENDS),
    "text_weights": ("float", "int8"),
    "quant.behaviour": ("default", "released"),
    "quant.act_range": ACT_RANGES,
    "quant.branch_moments": ("reset", "rotate", "keep"),
    "quant.branch_space": BRANCH_SPACES,
    "quant.decay_order": ("smallest", "largest"),
    "quant.decay_shape": ("cosine", "linear", "abrupt"),
    "quant.include_zero": ("", "yes", "no"),
    "quant.rotation": ("none", "hadamard"),
    "train.remat": POLICIES,
    "train.schedule": ("cosine", "constant_tail"),
    "train.target": ("teacher", "truth"),
    "train.teacher_weights": ("float", "int8"),
}
# What a number must reach, and stay below.
_RANGES = (
    ("seed", 0, _LARGEST),
    ("sample.seed", 0, _LARGEST),
    ("sample.unguided_steps", 0, _LARGEST),
    ("evaluate.seed", 0, _LARGEST),
    ("mesh.data", -1, _LARGEST),
    ("mesh.fsdp", -1, _LARGEST),
    ("mesh.context", -1, _LARGEST),
    ("mesh.tensor", -1, _LARGEST),
    ("quant.buckets", 1, 1001),
    ("quant.rank", 0, 2**16),
    ("quant.shrink", 2, _LARGEST),
    ("quant.smoothing", 0, 1),
    ("train.tail_rate", 0, 1),
    ("train.hang_minutes", 0, 1e5),
    ("data.fps", 0, 1000),
    ("calibration.exponent", 0, 1),
    ("calibration.smoothing_points", 2, 1000),
    ("train.truth_blend", 0, 50),
    ("train.ema_decay", 0, 1),
    ("train.beta1", 0, 1),
    ("train.beta2", 0, 1),
    ("train.weight_decay", 0, 100),
    *((f"train.learning_rate.{group}", 0, 100) for group in GROUPS),
)
# The same for what 0 makes no sense of.
_ABOVE_ZERO = (("train.epsilon", 1), ("train.clip_norm", 1e9), ("calibration.damping", 1e3))


def _value(config: Mapping, name: str) -> object:
    for part in name.split("."):
        if not isinstance(config, Mapping) or part not in config:
            raise UserError(
                f"the config has no {name}, which training reads; configs/wan1_3b_w4a4.py has it: "
                "add it to the config file"
            )
        config = config[part]
    return config


def check_config(config: Mapping) -> None:
    """Refuse values that would only fail, or silently mean something else, later.

    Raises:
        UserError: it names the key, its value and what it may be.
    """
    for name in _POSITIVE:
        value = _value(config, name)
        if not 1 <= value < _LARGEST:
            raise UserError(
                f"--config.{name}={value}; expected a whole number from 1 to below 2^31"
            )
    for name, choices in _CHOICES.items():
        value = _value(config, name)
        if value not in choices:
            raise UserError(f"--config.{name}={value}; expected one of {', '.join(choices)}")
    for name, what in _OPTIONAL.items():
        value = _value(config, name)
        if not 0 <= value < _LARGEST:
            raise UserError(
                f"--config.{name}={value}; expected a whole number below 2^31, 0 for no {what}"
            )
    for name, low, high in _RANGES:
        value = _value(config, name)
        if not low <= value < high:
            raise UserError(
                f"--config.{name}={value}; expected a number from {low} to below {high}"
            )
    for name, high in _ABOVE_ZERO:
        value = _value(config, name)
        if not 0 < value < high:
            raise UserError(f"--config.{name}={value}; expected a number above 0, below {high:g}")
    train, quant = config["train"], config["quant"]
    for name in ("train.caption_dropout", "data.most_refused"):
        value = _value(config, name)
        if not 0 <= value <= 1:
            raise UserError(f"--config.{name}={value}; expected 0 to 1, a share")
    for name in ("data.buckets", "data.on_the_fly", "train.freeze_weights", "train.scale_aware"):
        _value(config, name)
    _check_cut(config["data"])
    if not 0 < train.get("shift", 1) < 1000:
        raise UserError(f"--config.train.shift={train['shift']}; expected above 0, below 1000")
    for name in ("weight_bits", "act_bits"):
        _check_bits(f"quant.{name}", quant[name])
    _check_layers(quant["bits"], quant["full_precision"])
    _check_validation(train, config["evaluate"])
    _check_table(quant["time_table"], quant["table_steps"])
    _check_target(train)
    if train["batch_size"] % train["accumulate"]:
        raise UserError(
            f"train.batch_size={train['batch_size']} does not divide into "
            f"train.accumulate={train['accumulate']} equal parts; change one of them"
        )
    if not 0 <= train["warmup_steps"] < train["steps"]:
        raise UserError(
            f"train.warmup_steps={train['warmup_steps']} with train.steps={train['steps']}; the "
            "warm-up must end before training does, set --config.train.warmup_steps too"
        )
    _check_steps(quant)
    if quant["branch_space"] == "merged":
        _check_adapter(train, quant)
        return
    phase_steps_for(
        train["steps"],
        quant["decay_fraction"],
        quant["rank"],
        quant["shrink"],
        quant["decay_shape"],
    )


def check_unguided(config: Mapping, steps: int) -> None:
    """Refuse an export that would leave guidance off in more steps than it takes.

    Args:
        config: the run's.
        steps: the pipeline's own number of steps.

    Raises:
        UserError: it names the key, its value and what it may be.
    """
    unguided = config["sample"]["unguided_steps"]
    if not 0 <= unguided <= steps:
        raise UserError(
            f"--config.sample.unguided_steps={unguided}; expected a whole number from 0 to {steps},"
            " the steps that this pipeline takes by default"
        )


def _check_cut(data: Mapping) -> None:
    cut_of(data)
    if data["clips_per_video"] > 1 and not data["fps"]:
        raise UserError(
            f"--config.data.clips_per_video={data['clips_per_video']} needs a rate: without one, a "
            "clip is the whole video; set --config.data.fps"
        )


def _check_validation(train: Mapping, evaluate: Mapping) -> None:
    if train["validate_every"] and not evaluate["held_out"]:
        raise UserError(
            f"--config.train.validate_every={train['validate_every']} needs clips that training "
            "does not see; name their folder by --config.evaluate.held_out"
        )
    if train["validate_videos"] and not train["validate_every"]:
        raise UserError(
            f"--config.train.validate_videos={train['validate_videos']} are part of a validation; "
            "say how often by --config.train.validate_every too"
        )
    if train["export_best"] and not train["validate_every"]:
        raise UserError(
            "--config.train.export_best=True needs to know which is the best; set "
            "--config.train.validate_every too"
        )


def _check_target(train: Mapping) -> None:
    if train["target"] == "truth" and train["truth_blend"]:
        raise UserError(
            f"--config.train.target=truth with --config.train.truth_blend={train['truth_blend']}: "
            "a blend needs the teacher; set one of them back (target=teacher, or truth_blend=0)"
        )


def _check_steps(quant: Mapping) -> None:
    if quant["act_range"] != "token" and (quant["smoothing"] or quant["rotation"] != "none"):
        raise UserError(
            f"--config.quant.act_range={quant['act_range']} with quant.smoothing="
            f"{quant['smoothing']}, quant.rotation={quant['rotation']}: a learned step starts from "
            "tokens as the teacher has them; set smoothing=0 and rotation=none, or act_range=token"
        )


def _check_adapter(train: Mapping, quant: Mapping) -> None:
    if not quant["rank"]:
        raise UserError(
            "--config.quant.branch_space=merged is an adapter, and quant.rank=0 leaves it no "
            "columns; set --config.quant.rank=32, or branch_space=tokens for plain training"
        )
    if train["ema_decay"]:
        raise UserError(
            f"--config.train.ema_decay={train['ema_decay']} averages weights once the branch is "
            "gone, and a merged adapter stays; set it to 0"
        )


def _check_table(time_table: bool, steps: tuple[int, ...]) -> None:
    if not all(isinstance(count, int) and 1 <= count <= 1000 for count in steps):
        raise UserError(
            f"--config.quant.table_steps={steps}; expected numbers of steps from 1 to 1000, such "
            "as (20, 30), or () for the pipeline's own alone"
        )
    if steps and not time_table:
        raise UserError(
            f"--config.quant.table_steps={steps} is for the time table, which this run has not; "
            "add --config.quant.time_table=True, or leave it away"
        )


def _check_bits(name: str, *bits: int) -> None:
    if not all(2 <= width <= 8 for width in bits):
        shown = ", ".join(map(str, bits))
        raise UserError(f"--config.{name}={shown}; expected whole numbers of bits from 2 to 8")


def _check_layers(bits: tuple, full_precision: tuple) -> None:
    for entry in bits:
        kinds = [type(part) for part in entry] if isinstance(entry, tuple | list) else []
        if kinds != [str, int, int]:
            raise UserError(
                f"--config.quant.bits={bits!r}; expected (layer's name, weight bits, activation "
                "bits) of each layer that differs, such as (('blocks.attn1.to_q', 8, 8),)"
            )
        _check_bits(f"quant.bits of {entry[0]}", *entry[1:])
    if names := named_twice(bits):
        raise UserError(
            f"--config.quant.bits={bits!r} names {', '.join(names)} more than once; leave one "
            "entry of each"
        )
    if not all(isinstance(name, str) for name in full_precision):
        raise UserError(
            f"--config.quant.full_precision={full_precision!r}; expected names of layers, such as "
            "('blocks.attn1.to_q',)"
        )
