"""What the files hold that a report is made of; anybody may have changed them meanwhile.

A shape is a type, a list of one shape, or a dict of them; a key that ends in `?` may be absent or
null. Keys that no shape names are left alone.
"""

from pathlib import Path
from typing import Any

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_json

NUMBER, FILE = "a number", "the name of a file beside it"
_COUNT = {"count": NUMBER, "total": NUMBER}
_VERDICT = _COUNT | {"interval": (NUMBER, NUMBER)}
_VARIANT = {
    "name": str,
    "strict?": _VERDICT,
    "plain?": _VERDICT,
    "shape?": _COUNT,
    "colour?": _COUNT,
    "direction?": _COUNT,
    "strict_difference?": {"mean": NUMBER, "interval": (NUMBER, NUMBER)},
    "latent_difference?": NUMBER,
    "seconds_per_video?": NUMBER,
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
SAMPLES = [{"prompt": str, "teacher": FILE, "student": FILE, "seed": NUMBER}]


def read_input(path: Path, shape: Any) -> Any:
    """What a file of the workdir holds; None where there is none.

    Raises:
        UserError: it is no JSON, or not of its shape; it names the place.
    """
    if not path.is_file():
        return None
    remedy = "remove it and run the job that wrote it again"
    content = read_json(path, remedy)
    if place := _misfit(content, shape, ""):
        raise UserError(f"{path} has something else than {place}; {remedy}")
    return content


def read_evaluation(path: Path) -> Any:
    """`read_input` of an evaluation; of one without variants nothing but the timing is read.

    Raises:
        UserError: as `read_input`.
    """
    content = read_input(path, {"variants?": list} | _OPTIONAL)
    return read_input(path, _JUDGED) if content and content.get("variants") else content


def _misfit(value: Any, shape: Any, where: str) -> str | None:
    """The first place where a value is not of its shape, and what was expected there."""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"an object at {where or 'its top'}"
        parts = []
        for key, inner in shape.items():
            name = key.removesuffix("?")
            if value.get(name) is not None or name == key:
                parts.append((value.get(name), inner, f"{where}.{name}".lstrip(".")))
    elif isinstance(shape, list | tuple):
        if not isinstance(value, list) or (isinstance(shape, tuple) and len(value) != len(shape)):
            return f"a list at {where or 'its top'}"
        parts = [(part, shape[0], f"{where}[{i}]") for i, part in enumerate(value)]
    else:
        return None if _is(value, shape) else f"{_named(shape)} at {where or 'its top'}"
    return next((place for part in parts if (place := _misfit(*part))), None)


def _is(value: Any, kind: Any) -> bool:
    if kind is FILE:
        plain = isinstance(value, str) and value.isprintable() and 0 < len(value) < 256
        return plain and value != ".." and not set(value) & set("/\\")
    if kind is NUMBER:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and not abs(value) >= 1e18  # NaN is one, too.
    return isinstance(value, kind)


def _named(kind: Any) -> str:
    return (
        kind
        if isinstance(kind, str)
        else {str: "a string", dict: "an object", list: "a list"}[kind]
    )
