"""What the files hold that a report is made of; anybody may have changed them meanwhile.

A shape is a type, a list of one shape, or a dict of them; a key that ends in `?` may be absent or
null, and the key `str` stands for any. Keys that no shape names are left alone.
"""

import math
from pathlib import Path
from typing import Any

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.report.curves import LEARNING_RATES
from qvgen_jax.json_file import read_json

NUMBER, MAYBE, FILE = "a number", "a number or null", "the name of a file beside it"
LOGGED = "a number of float32's range"  # Infinite and NaN are, as a run that diverges logs them.
PATH = "a path inside the workdir"
_LARGEST = {NUMBER: 1e18, LOGGED: 1e39}
_COUNT = {"count": NUMBER, "total": NUMBER}
_VERDICT = _COUNT | {"interval": (NUMBER, NUMBER)}
_ESTIMATE = {"mean": NUMBER, "interval": (NUMBER, NUMBER)}
_MEASURES = ("psnr", "ssim", "consistency", "consistency_difference", "motion")
_SPEED = ("seconds_per_video", "ratio_to_reference", "weights_bytes", "peak_bytes")
_VARIANT = {
    "name": str,
    "strict?": _VERDICT,
    "plain?": _VERDICT,
    "shape?": _COUNT,
    "colour?": _COUNT,
    "direction?": _COUNT,
    "strict_difference?": _ESTIMATE,
    "latent_difference?": NUMBER,
    "seconds_per_video?": NUMBER,
    "metrics?": {f"{name}?": _ESTIMATE for name in _MEASURES},
    "speed?": {f"{name}?": NUMBER for name in _SPEED},
}
_OPTIONAL = {"device?": str, "timing?": str, "seed?": NUMBER, "versions?": dict}
_JUDGED = {
    "videos": NUMBER,
    "steps": NUMBER,
    "guidance_scale": NUMBER,
    "prompts": str,
    "variants": [_VARIANT],
} | _OPTIONAL
_SIDES = ("transformer_bf16_bytes", "transformer_export_bytes")
_LINEARS = ("linears_bf16_bytes", "linears_export_bytes")
SIZES = dict.fromkeys((*_SIDES, *_LINEARS), NUMBER) | {
    "rows?": [{"name": str, "bf16_bytes": NUMBER, "export_bytes": NUMBER}]
}
CONFIG = {"quant?": dict, "command?": str}
_ASKED = {"prompt": str, "seed": NUMBER}
SAMPLES = [_ASKED | {"teacher": FILE, "student": FILE}]
VIDEOS = [_ASKED | {"videos": {str: PATH}}]
_LAYER = {
    "weight_error?": NUMBER,
    "branch_norm?": NUMBER,
    "singular_values?": [MAYBE],
    "clip_low?": NUMBER,
    "clip_high?": NUMBER,
}
ALARM = {"step": NUMBER, "alarm": str}
_CURVES = ("loss", "held_out_loss", "grad_norm", "gate", "small_singular_share")
_COUNTERS = ("steps_per_second", "skipped")
METRICS = {"step": NUMBER} | {
    f"{name}?": LOGGED for name in (*_CURVES, *_COUNTERS, "rank", *LEARNING_RATES)
}
VALIDATION = {
    "step": NUMBER,
    "timesteps?": [NUMBER],
    "cosine?": [MAYBE],
    "relative?": [MAYBE],
    "normalised?": [MAYBE],
    "drift?": {"relative?": NUMBER},
    "layers?": {str: _LAYER},
    "videos?": [_ASKED | {"teacher": PATH, "student": PATH}],
}


def read_input(path: Path, shape: Any) -> Any:
    """What a file of the workdir holds; None where there is none.

    Raises:
        UserError: it is no JSON, or not of its shape; it names the place.
    """
    if not path.is_file():
        return None
    remedy = "remove it and run the job that wrote it again"
    content = read_json(path, remedy)
    check_shape(content, shape, str(path), remedy)
    return content


def check_shape(content: Any, shape: Any, name: str, remedy: str) -> None:
    """Raises UserError, which names the place, for content that is not of its shape."""
    if place := _misfit(content, shape, ""):
        raise UserError(f"{name} has something else than {place}; {remedy}")


def read_evaluation(path: Path) -> Any:
    """`read_input` of an evaluation; of one without variants nothing but the timing is read.

    Raises:
        UserError: as `read_input`.
    """
    content = read_input(path, {"variants?": list} | _OPTIONAL)
    return read_input(path, _JUDGED) if content and content.get("variants") else content


def find_variant(evaluation: dict | None, start: str) -> dict | None:
    """The first variant of an evaluation whose name starts so."""
    variants = (evaluation or {}).get("variants", [])
    return next((v for v in variants if v["name"].startswith(start)), None)


def find_student(evaluation: dict | None) -> dict | None:
    """The trained student's variant, whatever its method is called."""
    variants = (evaluation or {}).get("variants", [])
    others = ("Full precision", "Round-to-nearest")
    return next((v for v in variants if not v["name"].startswith(others)), None)


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """The first place where a value is not of its shape, and what was expected there."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"an object at {where or 'its top'}"
        parts = [
            (value.get(name), inner, f"{where}.{name}".lstrip("."))
            for name, inner, needed in _expected(shape, value)
            if needed or value.get(name) is not None
        ]
    elif isinstance(shape, list | tuple):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            return f"a list at {where or 'its top'}"
        parts = [(part, shape[0], f"{where}[{i}]") for i, part in enumerate(value)]
    else:
        return None if _is(value, shape) else f"{_named(shape)} at {where or 'its top'}"
    return next((place for part in parts if (place := _misfit(*part))), None)


def _expected(shape: dict, value: dict) -> list[tuple[str, Any, bool]]:
    """(key, shape, whether it must be there) of each that is looked at."""
    if str in shape:
        return [(name, shape[str], True) for name in value]
    return [(key.removesuffix("?"), inner, key[-1] != "?") for key, inner in shape.items()]


def _is(value: Any, kind: Any) -> bool:
    if kind is FILE:
        return isinstance(value, str) and _is_file_name(value)
    if kind is PATH:
        return isinstance(value, str) and all(map(_is_file_name, value.split("/")))
    if kind is MAYBE:
        return value is None or _is(value, NUMBER)
    if kind in (NUMBER, LOGGED):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind is LOGGED and isinstance(value, float) and math.isinf(value):
            return True
        return number and not abs(value) >= _LARGEST[kind]  # NaN is one, too.
    return isinstance(value, kind)


def _is_file_name(text: str) -> bool:
    plain = text.isprintable() and 0 < len(text) < 256
    return plain and text not in (".", "..") and not set(text) & set("/\\")


def _named(kind: Any) -> str:
    return (
        kind
        if isinstance(kind, str)
        else {str: "a string", dict: "an object", list: "a list"}[kind]
    )
