"""Writes a full-precision pipeline as a folder in diffusers' layout, for it and for us."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert import t5, wan_transformer, wan_vae
from convert.names import Entry, to_torch
from convert.tensors import write_tensors
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.text.t5 import T5Config

MODEL_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": "0.42.1",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
}
SCHEDULER = {
    "_class_name": "UniPCMultistepScheduler",
    "_diffusers_version": "0.42.1",
    "disable_corrector": [],
    "final_sigmas_type": "zero",
    "flow_shift": 3.0,
    "lower_order_final": True,
    "num_train_timesteps": 1000,
    "predict_x0": True,
    "prediction_type": "flow_prediction",
    "solver_order": 2,
    "solver_type": "bh2",
    "thresholding": False,
    "use_flow_sigmas": True,
}
# What the config files say beyond the fields that our configs hold.
_TRANSFORMER = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "cross_attn_norm": True,
    "image_dim": None,
    "pos_embed_seq_len": None,
    "qk_norm": "rms_norm_across_heads",
}
_VAE = {
    "_class_name": "AutoencoderKLWan",
    "attn_scales": [],
    "dropout": 0.0,
    "is_residual": False,
    "patch_size": None,
}
_TEXT_ENCODER = {
    "architectures": ["UMT5EncoderModel"],
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.0,
    "dtype": "float32",  # what transformers computes in; the weights may be stored shorter
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "model_type": "umt5",
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def save_pipeline(
    folder: str | Path,
    *,
    transformer: tuple[WanConfig, Mapping],
    vae: tuple[WanVAEConfig, Mapping],
    text_encoder: tuple[T5Config, Mapping],
    tokenizer_folder: str | Path,
    scheduler_config: Mapping[str, Any] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Writes the folder; what is there already is overwritten.

    Args:
        folder: made if need be.
        transformer: its config and parameters (our nested dict); likewise the next two.
        tokenizer_folder: copied; may be the folder's own `tokenizer/`.
        scheduler_config: changes to Wan's UniPC settings, such as `{"flow_shift": 3.0}`.
        generation_config: defaults of `generate`, see `qvgen_jax.generation_config`.
        dtype: of the stored weights: bfloat16, float16 or float32.
    """
    folder = Path(folder)
    config, params = transformer
    fields = {**_TRANSFORMER, **dataclasses.asdict(config)}
    table = wan_transformer.name_table(config)
    _write_model(folder / "transformer", "diffusion_pytorch_model", fields, table, params, dtype)

    save_vae(folder / "vae", *vae, dtype)

    config, params = text_encoder
    fields = {**_TEXT_ENCODER, **dataclasses.asdict(config)}
    _write_model(folder / "text_encoder", "model", fields, t5.name_table(config), params, dtype)

    scheduler = {**SCHEDULER, **(scheduler_config or {})}
    write_json(folder / "scheduler/scheduler_config.json", scheduler)
    write_json(folder / "model_index.json", MODEL_INDEX)
    if generation_config is not None:
        write_json(folder / "generation_config.json", generation_config)
    if Path(tokenizer_folder).resolve() != (folder / "tokenizer").resolve():
        shutil.copytree(tokenizer_folder, folder / "tokenizer", dirs_exist_ok=True)


def save_vae(folder: str | Path, config: WanVAEConfig, params: Mapping, dtype: str) -> None:
    """Writes a pipeline's `vae/` folder alone."""
    factors = {
        "scale_factor_temporal": config.temporal_factor,
        "scale_factor_spatial": config.spatial_factor,
    }
    fields = {**_VAE, **dataclasses.asdict(config), **factors}
    table = wan_vae.name_table(config)
    _write_model(Path(folder), "diffusion_pytorch_model", fields, table, params, dtype)


def _write_model(
    folder: Path, stem: str, fields: Mapping, table: list[Entry], params: Mapping, dtype: str
) -> None:
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    tensors = {name: array.astype(stored) for name, array in to_torch(table, params).items()}
    write_json(folder / "config.json", fields)
    write_tensors(folder / f"{stem}.safetensors", tensors)


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    """Writes one JSON file, its folder too if need be; keys are sorted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(fields, indent=2, sort_keys=True)
    path.write_text(text + "\n", encoding="utf-8")
