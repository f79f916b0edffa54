"""Which model a transformer's `config.json` describes: its config, its name table, its shapes."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from convert import wan_transformer
from convert.names import Entry
from qvgen_jax.errors import UserError
from qvgen_jax.models.wan import WanConfig, WanTransformer


class _Family(NamedTuple):
    config: type
    model: Callable[..., nnx.Module]
    table: Callable[[Any], list[Entry]]


_FAMILIES = {
    "WanTransformer3DModel": _Family(WanConfig, WanTransformer, wan_transformer.name_table),
}


def config_from_json(fields: Mapping[str, Any]) -> Any:
    """The config of the family that `_class_name` names.

    Raises:
        UserError: the class is unknown, or the family does not know this variant.
    """
    name = fields.get("_class_name", "WanTransformer3DModel")
    if name not in _FAMILIES:
        raise UserError(
            f"the transformer's config.json is of a {name}; supported are {', '.join(_FAMILIES)}"
        )
    return _FAMILIES[name].config.from_json(fields)


def _family(config: Any) -> _Family:
    return next(family for family in _FAMILIES.values() if type(config) is family.config)


def table_for(config: Any) -> list[Entry]:
    """Every tensor of the full-precision transformer."""
    return _family(config).table(config)


def abstract_params(config: Any) -> dict:
    """The transformer's nested dict with `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    model = nnx.eval_shape(lambda: _family(config).model(config, key=jax.random.key(0)))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))
