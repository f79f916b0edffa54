"""Which model a transformer's `config.json` describes: its config, its name table, its shapes."""

from convert import cogvideox_transformer, wan_transformer
from convert.names import Entry
from qvgen_jax.models import TransformerConfig, abstract_params, config_from_json
from qvgen_jax.models.cogvideox import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig

__all__ = ["abstract_params", "config_from_json", "table_for"]

_TABLES = {
    WanConfig: wan_transformer.name_table,
    CogVideoXConfig: cogvideox_transformer.name_table,
}


def table_for(config: TransformerConfig) -> list[Entry]:
    """Every tensor of the full-precision transformer."""
    return _TABLES[type(config)](config)
