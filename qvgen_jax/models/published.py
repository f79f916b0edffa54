"""The published models by their names on the Hugging Face hub: what they are, without their files.

The numbers of their `config.json`; the tests compare them with those files. For plans and tables
that need no weights.
"""

from pathlib import Path

from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, config_from_file
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig

PUBLISHED: dict[str, TransformerConfig] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": WanConfig(
        num_attention_heads=12, ffn_dim=8960, num_layers=30
    ),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": WanConfig(),
    "zai-org/CogVideoX-2b": CogVideoXConfig(),
    "zai-org/CogVideoX-5b": CogVideoXConfig(
        num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True
    ),
    "zai-org/CogVideoX1.5-5B": CogVideoXConfig(
        num_attention_heads=48,
        num_layers=42,
        sample_width=300,
        sample_height=300,
        sample_frames=81,
        patch_size=(2, 2, 2),
        use_rotary_positional_embeddings=True,
    ),
}
"""The text-to-video models that are supported."""


def transformer_config(model: str) -> TransformerConfig:
    """The transformer of a pipeline folder, or of a published one by name.

    Raises:
        UserError: it is neither.
    """
    if model in PUBLISHED:
        return PUBLISHED[model]
    path = Path(model).expanduser() / "transformer" / "config.json"
    if not path.is_file():
        raise UserError(
            f"{model} is no pipeline folder here (there is no {path}) and none of the published "
            f"models, {', '.join(PUBLISHED)}"
        )
    return config_from_file(path)
