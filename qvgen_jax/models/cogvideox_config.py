"""What a CogVideoX transformer's `config.json` says, and which of them are supported."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from qvgen_jax.config_fields import Layers, Positive, check_fields, check_value, refusal
from qvgen_jax.errors import UserError

SUPPORTED = "CogVideoX-2B, CogVideoX-5B and CogVideoX1.5-5B text-to-video"

# Fields of config.json that only other variants use, and the value that the supported ones have.
_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "dropout": 0.0,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "norm_elementwise_affine": True,
    "ofs_embed_dim": None,
    "temporal_compression_ratio": 4,
    "timestep_activation_fn": "silu",
    "use_learned_positional_embeddings": False,
}


@dataclasses.dataclass(frozen=True)
class CogVideoXConfig:
    """The fields of a CogVideoX transformer's `config.json` that vary between the three models.

    Attributes:
        patch_size: frames, height and width; two frames make it a CogVideoX1.5.
        max_text_seq_length: to which prompts are padded; the network takes any length.
        sample_width: of the latents the 5B was trained at, with `sample_height`; rotary positions
            of other sizes are fitted into it. For 2B and 1.5 only the size diffusers defaults to.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    num_layers: Layers = 30
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: tuple[int, int, int] = (1, 2, 2)
    max_text_seq_length: int = 226
    norm_eps: Positive = 1e-5
    spatial_interpolation_scale: Positive = 1.875
    temporal_interpolation_scale: Positive = 1.0
    use_rotary_positional_embeddings: bool = False

    @property
    def dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def unfolds_patches(self) -> bool:
        """Whether patches go through a linear, which is quantized, or a convolution, which is not.

        CogVideoX1.5 against the others, in PyTorch; the arithmetic is the same.
        """
        return self.patch_size[0] > 1

    def extra_frames(self, frames: int) -> int:
        """How many latent frames to put before `frames` of them to fill the temporal patches.

        0 but for CogVideoX1.5. Sampling draws their noise like the others' and drops them before
        decoding (diffusers, `pipeline_cogvideox.py`); training repeats the first latent frame (the
        model authors' finetuning). The transformer itself takes whole patches only.
        """
        return -frames % self.patch_size[0]

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "CogVideoXConfig":
        """From the contents of `config.json`; keys with a leading underscore are notes.

        Raises:
            UserError: the file describes another variant (image-to-video, ...), or a value is not
                of its field's kind or range.
        """
        fields = dict(fields)
        name = fields.get("_class_name", "CogVideoXTransformer3DModel")
        fields.pop("quantization_config", None)
        values = {key: value for key, value in fields.items() if not key.startswith("_")}
        for key, expected in _FIXED.items():
            if values.pop(key, expected) != expected:
                raise UserError(
                    f"{key} = {fields[key]!r} in the transformer's config.json: only {SUPPORTED} "
                    f"models are supported, which have {key} = {expected!r}"
                )
        frames, patch = values.pop("patch_size_t", None), values.pop("patch_size", 2)
        bias = values.pop("patch_bias", True)
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if name != "CogVideoXTransformer3DModel" or unknown:
            raise UserError(
                f"the transformer's config.json is of a {name} with unknown fields {unknown}: "
                f"supported is CogVideoXTransformer3DModel of {SUPPORTED}"
            )
        what = "the transformer's config.json"
        check_value(frames, int | None, "patch_size_t", what)
        check_value(patch, int, "patch_size", what)
        check_value(bias, bool, "patch_bias", what)
        config = cls(**values, patch_size=(frames or 1, patch, patch))
        check_fields(config, what)
        for field in ("sample_height", "sample_width"):
            if getattr(config, field) < patch:
                raise refusal(field, getattr(config, field), what, f"at least patch_size = {patch}")
        if config.in_channels != config.out_channels:
            raise UserError(
                f"in_channels = {config.in_channels} but out_channels = {config.out_channels} in "
                "the transformer's config.json: image-to-video models are not supported, only "
                f"{SUPPORTED}, where both are equal"
            )
        rotary = config.use_rotary_positional_embeddings
        # PyTorch's linear over temporal patches has its bias whatever patch_bias says.
        known = rotary and frames > 1 if frames is not None else bias
        divided = config.attention_head_dim if rotary else config.dim
        if not known or divided % 16:
            raise UserError(
                f"patch_size_t = {frames}, patch_bias = {bias}, use_rotary_positional_embeddings = "
                f"{rotary} and {divided} channels that tell positions in the transformer's "
                f"config.json: no such model is known, supported are {SUPPORTED}"
            )
        return config
