"""What an exported transformer takes: on disk, on the device, and while it is loaded.

    python benchmarks/load_memory.py --model Wan-AI/Wan2.1-T2V-14B-Diffusers --folder /tmp
    python benchmarks/load_memory.py --model zai-org/CogVideoX-2b --bits 3 --folder /tmp

Writes an export of the published model's names and shapes with random codes, loads it in a process
of its own, whose peak resident memory the kernel reports, and deletes it. docs/kernels.md holds the
results.
"""

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from convert.names import torch_names, torch_shape
from convert.packed import linear_stems, packed_definition, split_table
from convert.safetensors_writer import Spec, write_stream
from convert.save import write_json
from convert.tables import table_for
from qvgen_jax.models import TransformerConfig, abstract_params, quantizable, text_only
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.code_planes import packed_bytes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.packed import quantization_config

_FLOAT32, _BYTE = np.dtype(np.float32), np.dtype(np.uint8)


def specs_of(config: TransformerConfig, quant: QuantConfig) -> dict[str, Spec]:
    """Every tensor of the export."""
    shapes, specs = abstract_params(config), {}
    kernels, rest = split_table(table_for(config), quant.quantized(quantizable(config)))
    for entry in rest:
        shape = layer_at(shapes, ".".join(entry.path)).shape
        shape = torch_shape(shape[entry.layers is not None :], entry)
        specs |= {name: Spec(_FLOAT32, shape) for name in torch_names([entry])}
    for name, entry in kernels.items():
        inner, columns = layer_at(shapes, name)["kernel"].shape[-2:]
        for stem in linear_stems(entry):
            packed = packed_bytes(inner, quant.bits_of(name)[0])
            specs |= {
                f"{stem}.codes": Spec(_BYTE, (columns, packed)),
                f"{stem}.scale": Spec(_FLOAT32, (columns,)),
                f"{stem}.zero_point": Spec(_FLOAT32, (columns,)),
                f"{stem}.clips": Spec(_FLOAT32, (quant.buckets_of(name), 2)),
            }
            if "bias" in layer_at(shapes, name):
                specs[f"{stem}.bias"] = Spec(_FLOAT32, (columns,))
    return specs


def arrays_of(specs: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.Generator(np.random.SFC64(0))
    for name, spec in specs.items():
        if spec.dtype == _BYTE:
            yield name, np.frombuffer(rng.bytes(spec.nbytes), np.uint8).reshape(spec.shape)
        else:
            yield name, np.full(spec.shape, 0.01, np.float32)


def write_export(folder: Path, config: TransformerConfig, quant: QuantConfig) -> int:
    """A packed transformer's folder; returns the bytes of its tensors."""
    wan = isinstance(config, WanConfig)
    fields = dataclasses.asdict(config)
    if not wan:
        frames, patch, _ = fields.pop("patch_size")
        fields |= {"patch_size": patch, "patch_size_t": frames if frames > 1 else None}
        fields |= {"patch_bias": frames == 1}
    name = "WanTransformer3DModel" if wan else "CogVideoXTransformer3DModel"
    packing = {"quantization_config": quantization_config(quant)}
    write_json(folder / "config.json", {"_class_name": name, **fields, **packing})
    specs = specs_of(config, quant)
    return write_stream(folder / "diffusion_pytorch_model.safetensors", specs, arrays_of(specs))


def load(folder: Path) -> None:
    """Loads it and prints what it takes, as JSON. Run in a process of its own."""
    import jax
    import jax.numpy as jnp

    from convert.load import read_transformer

    transformer = read_transformer(folder, jnp.dtype("bfloat16"))
    held = jax.device_put(transformer.states)
    sizes = {"codes": 0, "all": 0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(held):
        size = leaf.on_device_size_in_bytes()
        sizes["all"] += size
        sizes["codes"] += (
            size if path[-1].key in ("codes", "scale", "zero_point", "code_sum") else 0
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**sizes, "peak": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=tuple(PUBLISHED), default=next(iter(PUBLISHED)))
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 8), default=4)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(arguments.load)
        return
    config = PUBLISHED[arguments.model]
    quant = QuantConfig(arguments.bits, arguments.bits, rank=0, single_clip=text_only(config))
    shapes = abstract_params(config)
    linears = [layer_at(shapes, name)["kernel"].size for name in quantizable(config)]
    layouts = set(packed_definition(config, quant, "bfloat16").layouts.values())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        specs = specs_of(config, quant)
        packed = sum(
            spec.nbytes
            for name, spec in specs.items()
            if name.endswith((".codes", ".scale", ".clips")) or name.endswith(".zero_point")
        )
        disk = write_export(Path(folder), config, quant)
        command = [sys.executable, __file__, "--load", folder]
        found = json.loads(
            subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        )
    full = 2 * sum(linears)
    print(f"{arguments.model}, W{arguments.bits}, layouts {', '.join(sorted(layouts))}")
    print(f"linears in bf16: {full / 1e9:.2f} GB; packed on disk: {packed / full:.3f} of it")
    print(f"on the device: {found['codes'] / full:.3f} of it")
    print(f"transformer on disk {disk / 1e9:.2f} GB, on the device {found['all'] / 1e9:.2f} GB")
    print(f"peak resident memory while loading: {found['peak'] / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
