"""The golden checkpoints of the release as folders, and what its code computes with them."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from convert.packed import from_packed, packed_definition
from convert.released import import_released
from convert.save import write_json
from convert.tables import table_for
from convert.tensors import Tensors, read_json, write_tensors
from qvgen_jax.models import config_from_json, quantizable
from qvgen_jax.quant.packed import read_quantization_config
from qvgen_jax.transformer import Transformer
from tests.golden import tiny_models

GOLDEN = Path(__file__).parents[1] / "golden"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PHASE, BUCKETS = 6, 50
WAN = {"_class_name": "WanTransformer3DModel", **tiny_models.WAN_ODD}
COGVIDEOX = {
    "_class_name": "CogVideoXTransformer3DModel",
    **tiny_models.COGVIDEOX,
    "max_text_seq_length": 5,
}
TOLERANCE = 5e-6


def read_packed(folder: Path) -> Transformer:
    """The packed transformer of either family."""
    fields = read_json(folder / "config.json")
    config, quant = (
        config_from_json(fields),
        read_quantization_config(fields["quantization_config"]),
    )
    definition = packed_definition(config, quant, jnp.float32)
    names = quantizable(config)
    params = from_packed(table_for(config), Tensors(folder), names, quant, definition)
    return Transformer(config, definition.graphdef, (params, definition.levels))


class Release:
    """The golden checkpoint of one family as a folder, its base pipeline, and what it computes."""

    def __init__(self, root: Path, family: str, fields: dict):
        self.root, self.base, self.source = root, root / "base", root / "checkpoint"
        write_json(self.base / "transformer" / "config.json", fields)
        write_json(self.base / "model_index.json", {"_class_name": "WanPipeline"})
        write_json(self.base / "vae" / "config.json", {"z_dim": 4})
        self.source.mkdir()
        shutil.copy(GOLDEN / f"released_{family}.safetensors", self.source / WEIGHTS)
        (self.source / "LICENSE").write_text("the checkpoint's licence")
        with np.load(GOLDEN / f"released_{family}.npz") as arrays:
            self.golden = dict(arrays)

    def inputs(self, case: str) -> list[np.ndarray]:
        return [self.golden[f"{case}/{key}"] for key in ("latents", "timesteps", "text")]

    def checkpoint(self, name: str, change) -> Path:
        """A folder with a changed copy of the checkpoint's tensors."""
        tensors = dict(Tensors(self.source))
        change(tensors)
        folder = self.root / name
        folder.mkdir(exist_ok=True)
        write_tensors(folder / WEIGHTS, tensors)
        return folder

    def check(self, case: str, folder: Path, key: str = "velocity", **arguments) -> None:
        expected = self.golden[f"{case}/{key}"]
        with jax.default_matmul_precision("highest"):
            ours = read_packed(folder / "transformer")(*self.inputs(case), **arguments)
        np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * abs(expected).max())


def imported_last(release: Release) -> Path:
    """The checkpoint imported with the clips of an inference without `--fix`."""
    folder = release.root / "last"
    if not folder.exists():
        import_released(release.source, release.base, folder, clip_index="last")
    return folder


def with_adapters(release: Release) -> Path:
    """The checkpoint as trained with adapters, after its last phase."""
    names = [name for name in release.golden if name.startswith("adapters/")]

    def add_adapters(tensors):
        for name in [name for name in tensors if name.endswith((".L", ".R"))]:
            del tensors[name]
        tensors |= {name.removeprefix("adapters/"): release.golden[name] for name in names}

    return release.checkpoint("adapters", add_adapters)
