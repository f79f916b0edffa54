"""A small full-precision Wan pipeline folder with random weights in several files."""

import dataclasses
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from convert.names import to_torch
from convert.save import MODEL_INDEX, write_json
from convert.tables import table_for
from convert.tensors import write_tensors
from qvgen_jax.models import abstract_params
from qvgen_jax.models.wan import WanConfig
from tests.golden.tiny_models import WAN_ODD

CONFIG = WanConfig(**WAN_ODD | {"num_layers": 3})
FILES = [f"diffusion_pytorch_model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
INDEX = "diffusion_pytorch_model.safetensors.index.json"


def random_tensors(dtype: str = "float32") -> dict[str, np.ndarray]:
    """The transformer's tensors by PyTorch name."""
    rng = np.random.default_rng(0)
    stored = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(stored), abstract_params(CONFIG)
    )
    return to_torch(table_for(CONFIG), params)


def write_pipeline(folder: Path, tensors: dict[str, np.ndarray], files: int = 3) -> Path:
    """A folder in diffusers' layout; of the other components only what conversions look at."""
    transformer = folder / "transformer"
    fields = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(CONFIG)}
    write_json(transformer / "config.json", fields)
    write_json(folder / "model_index.json", MODEL_INDEX)
    write_json(folder / "vae" / "config.json", {"z_dim": 3})
    write_tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", {"a": np.ones(3)})
    (folder / "LICENSE.txt").write_text("terms")
    (folder / "README.md").write_text("# the model card")
    (folder / "vae" / "NOTICE").write_text("more terms")
    if files == 1:
        write_tensors(transformer / "diffusion_pytorch_model.safetensors", tensors)
        return folder
    where = {name: FILES[i % 3] for i, name in enumerate(tensors)}
    for file in FILES:
        write_tensors(transformer / file, {n: a for n, a in tensors.items() if where[n] == file})
    write_json(transformer / INDEX, {"metadata": {"total_size": 1}, "weight_map": where})
    return folder


def file_bytes(folder: Path) -> dict[str, bytes]:
    """Every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
