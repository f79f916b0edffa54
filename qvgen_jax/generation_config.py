"""How a pipeline samples where the call does not say: its `generation_config.json`, or its family's
own settings."""

from collections.abc import Mapping
from typing import Annotated, Any

from qvgen_jax.config_fields import Positive, Range, check_value, refusal
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig
from qvgen_jax.models.wan import WanConfig

WAN_DEFAULTS = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "steps": 50,
    "guidance_scale": 5.0,
    "unguided_steps": 0,
    "fps": 16,
    "max_length": 512,
}
"""What is used where neither the call nor the folder's `generation_config.json` says otherwise."""

COGVIDEOX_DEFAULTS = {
    "num_frames": 49,
    "height": 480,
    "width": 720,
    "steps": 50,
    "guidance_scale": 6.0,
    "unguided_steps": 0,
    "fps": 8,
    "max_length": 226,
}
"""The same for CogVideoX 2B and 5B."""

COGVIDEOX_1_5_DEFAULTS = COGVIDEOX_DEFAULTS | {
    "num_frames": 81,
    "height": 768,
    "width": 1360,
    "fps": 16,
}
"""The same for CogVideoX1.5; its config files disagree about the size, so they are not asked."""

# What a generation_config.json holds where it is not a whole number from 1.
_KINDS = {
    "guidance_scale": Annotated[float, Range(least=0)],
    "unguided_steps": Annotated[int, Range(least=0)],
    "fps": Positive,
}


def generation_defaults(
    fields: Mapping[str, Any], config: TransformerConfig, max_length: int, where: str
) -> dict[str, Any]:
    """The settings of a folder.

    Args:
        fields: of its `generation_config.json`; empty if it has none.
        config: its transformer's, which tells the family.
        max_length: the text tokens of its tokenizer.
        where: the file, for messages.

    Raises:
        UserError: a field is unknown, or not of its kind or range.
    """
    if isinstance(config, WanConfig):
        family = WAN_DEFAULTS
    else:
        family = COGVIDEOX_1_5_DEFAULTS if config.patch_size[0] > 1 else COGVIDEOX_DEFAULTS
    defaults = {**family, "max_length": max_length}
    unknown = sorted(set(fields) - set(defaults))
    if unknown:
        raise UserError(f"{where} has unknown fields {unknown}; known are {sorted(defaults)}")
    for name, value in fields.items():
        check_value(value, _KINDS.get(name, int), name, where)
    defaults |= fields
    steps, unguided = defaults["steps"], defaults["unguided_steps"]
    if unguided > steps:
        raise refusal("unguided_steps", unguided, where, f"at most {steps}, the steps there")
    return defaults
