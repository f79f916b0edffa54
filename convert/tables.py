"""Which tensors a network's folder holds: the name table of its configuration."""

from convert import cogvideox_transformer, cogvideox_vae, wan_transformer, wan_vae
from convert.names import Entry
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.models import CogVideoXConfig, TransformerConfig, WanConfig

_TABLES = {
    WanConfig: wan_transformer.name_table,
    CogVideoXConfig: cogvideox_transformer.name_table,
    WanVAEConfig: wan_vae.name_table,
    CogVideoXVAEConfig: cogvideox_vae.name_table,
}


def table_for(config: TransformerConfig | WanVAEConfig | CogVideoXVAEConfig) -> list[Entry]:
    """Every tensor of a full-precision transformer, or of an autoencoder."""
    return _TABLES[type(config)](config)
