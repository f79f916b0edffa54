"""Video diffusion transformers: what a `config.json` describes, whichever family it is of."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from qvgen_jax.errors import UserError
from qvgen_jax.models import cogvideox, wan
from qvgen_jax.models.cogvideox import CogVideoXTransformer
from qvgen_jax.models.cogvideox_config import SUPPORTED, CogVideoXConfig
from qvgen_jax.models.wan import WanConfig, WanTransformer

TransformerConfig = WanConfig | CogVideoXConfig

# `_class_name` in config.json -> its config, its network and its module.
_FAMILIES = {
    "WanTransformer3DModel": (WanConfig, WanTransformer, wan),
    "CogVideoXTransformer3DModel": (CogVideoXConfig, CogVideoXTransformer, cogvideox),
}


def config_from_json(fields: Mapping[str, Any]) -> TransformerConfig:
    """The config of a transformer from the contents of its `config.json`.

    Raises:
        UserError: the file describes a network of another kind, or a value is not of its kind.
    """
    name = fields.get("_class_name", "WanTransformer3DModel")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise UserError(
            f"the transformer's config.json is of a {name}; supported are WanTransformer3DModel of "
            f"Wan 2.1 text-to-video and CogVideoXTransformer3DModel of {SUPPORTED}"
        )
    return _FAMILIES[name][0].from_json(fields)


def config_from_file(path: str | Path) -> TransformerConfig:
    """The config in a `config.json`.

    Raises:
        UserError: the file cannot be read, or is of another network or another variant.
    """
    try:
        fields = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} is not a readable config.json ({error}); give the one beside the "
            "transformer's weights"
        ) from error
    return config_from_json(fields)


def _family(config: TransformerConfig) -> tuple:
    return next(family for family in _FAMILIES.values() if isinstance(config, family[0]))


def build_transformer(config: TransformerConfig, **options: Any) -> nnx.Module:
    """A `WanTransformer` or a `CogVideoXTransformer`; `options` are those of its class."""
    return _family(config)[1](config, **options)


def quantizable(config: TransformerConfig) -> tuple[str, ...]:
    """Dotted names of every linear that QVGen quantizes; `blocks.` ones stand for all layers."""
    return _family(config)[2].quantizable(config)


def text_only(config: TransformerConfig) -> tuple[str, ...]:
    """Those of the quantizable linears that see only the prompt."""
    return _family(config)[2].TEXT_ONLY


def time_only(config: TransformerConfig) -> tuple[str, ...]:
    """Those of the quantizable linears that see only the timestep."""
    return _family(config)[2].TIME_ONLY


def after_blocks(config: TransformerConfig) -> tuple[str, ...]:
    """Those of the quantizable linears that come behind the last block."""
    return _family(config)[2].AFTER_BLOCKS


def time_outputs(config: TransformerConfig) -> tuple[str, ...]:
    """Those of the `time_only` linears whose output something else than another one reads."""
    return _family(config)[2].TIME_OUTPUTS


def time_values(
    config: TransformerConfig, params: Mapping, timesteps: jax.Array
) -> dict[str, jax.Array]:
    """What the `time_outputs` linears say, in full precision.

    Args:
        config: of the transformer.
        params: its parameters; of them the `kernel` and `bias` of the `time_only` linears are read.
        timesteps: `[entries]`.

    Returns:
        Float32 `[entries, out]` by name, `[layers, entries, out]` for those of the blocks.
    """
    return _family(config)[2].time_values(config, params, jax.numpy.asarray(timesteps))


def values_of(config: TransformerConfig) -> dict[str, tuple[str, int]]:
    """Those of the quantizable linears that see attention's outputs.

    Returns:
        Each one's name to the linear that makes the attention's values, and the width of a head.
    """
    pairs = _family(config)[2].VALUES_OF
    return {name: (source, config.attention_head_dim) for name, source in pairs.items()}


def abstract_params(config: TransformerConfig | Mapping[str, Any] | str | Path) -> dict:
    """The parameters of a full-precision transformer as shapes and dtypes; nothing is allocated.

    Args:
        config: of the transformer, or the contents of its `config.json`, or the path of that file.

    Returns:
        The nested dict of parameters with `jax.ShapeDtypeStruct` leaves.

    Raises:
        UserError: the file cannot be read, or describes a network of another kind.
    """
    if isinstance(config, str | Path):
        config = config_from_file(config)
    if isinstance(config, Mapping):
        config = config_from_json(config)
    model = nnx.eval_shape(lambda: build_transformer(config, key=jax.random.key(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
