"""Peak memory and speed of the converter on the tensors of Wan 2.1 14B.

    python benchmarks/convert_memory.py sparse --folder /tmp
    python benchmarks/convert_memory.py random --folder /tmp --layers 8
    python benchmarks/convert_memory.py released --folder /tmp --layers 2

`sparse` makes files with every name and shape of the published float32 model (57 GB) whose bytes
are holes, and imports them: all zeros, which the arrays do not store, so nearly no disk is used.
`random` makes, imports, verifies and exports a model of some of its layers with real bytes, beside
a plain copy of the same files; it needs three times the model's size. `released` makes a checkpoint
of the release's form in bfloat16, every linear quantized with a branch of rank 32, imports it at a
phase boundary and verifies the import. Every step is a process of its own whose peak resident
memory the kernel reports, and starts with the source out of the page cache. What was made is
deleted. docs/convert.md and docs/released.md hold the results.
"""

import argparse
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from convert.names import torch_names, torch_shape
from convert.plan import leaf_shapes
from convert.released_names import linears_of, other_shapes, quantized_shapes
from convert.safetensors_writer import Spec, write_stream
from convert.save import MODEL_INDEX, write_json
from convert.tables import table_for
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.config import QuantConfig

_SHARD_BYTES = 5_000_000_000
_BLOCK = 1 << 22
_RANK = 32


def shapes_of(config: WanConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the published checkpoint."""
    shapes = leaf_shapes(config)
    return {
        name: torch_shape(shapes[entry.path][entry.layers is not None :], entry)
        for entry in table_for(config)
        for name in torch_names([entry])
    }


def shards(shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names by file, in the order of diffusers' files."""
    shard, size = [], 0
    for name in sorted(shapes):
        nbytes = 4 * math.prod(shapes[name])
        if shard and size + nbytes > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    yield shard


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], random: bool) -> None:
    """A float32 safetensors file of holes, or of random finite numbers of every size up to 2."""
    fields, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        fields[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(fields).encode()
    rng = np.random.Generator(np.random.SFC64(len(header)))
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for start in range(0, end if random else 0, _BLOCK):
            bits = np.frombuffer(rng.bytes(min(_BLOCK, end - start)), np.uint32)
            file.write(bits & np.uint32(0xBFFFFFFF))
        file.truncate(8 + len(header) + end)


def write_source(folder: Path, config: WanConfig, random: bool) -> int:
    """A pipeline folder that is only a transformer; returns the bytes of its largest tensor."""
    shapes, where = shapes_of(config), {}
    fields = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(config)}
    write_json(folder / "transformer" / "config.json", fields)
    write_json(folder / "model_index.json", MODEL_INDEX)
    files = list(shards(shapes))
    for i, names in enumerate(files, start=1):
        file = f"diffusion_pytorch_model-{i:05}-of-{len(files):05}.safetensors"
        write_shard(folder / "transformer" / file, {name: shapes[name] for name in names}, random)
        where |= dict.fromkeys(names, file)
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    write_json(index, {"metadata": {}, "weight_map": where})
    return max(4 * math.prod(shape) for shape in shapes.values())


def write_released(folder: Path, base: Path, config: WanConfig) -> int:
    """A checkpoint of the release's form and its base; returns the bytes of its largest tensor."""
    fields = {"_class_name": "WanTransformer3DModel", **dataclasses.asdict(config)}
    write_json(base / "transformer" / "config.json", fields)
    write_json(base / "model_index.json", MODEL_INDEX)
    shapes = other_shapes(config)
    for linear in (linear for linears in linears_of(config).values() for linear in linears):
        leaves = quantized_shapes(linear, QuantConfig.buckets)
        leaves |= {"wquantizer.L": (linear.fan_out, _RANK), "wquantizer.R": (_RANK, linear.fan_in)}
        shapes |= {f"{linear.stem}.{leaf}": shape for leaf, shape in leaves.items()}
    specs = {name: Spec(np.dtype(ml_dtypes.bfloat16), shape) for name, shape in shapes.items()}
    folder.mkdir()
    write_stream(folder / "diffusion_pytorch_model.safetensors", specs, random_tensors(specs))
    return max(spec.nbytes for spec in specs.values())


def random_tensors(specs: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
    """Weights of variance 1, which codes of 4 bits between -3 and 3 stand for."""
    rng = np.random.Generator(np.random.SFC64(0))
    for name, spec in specs.items():
        array = rng.standard_normal(spec.shape, np.float32)
        if name.endswith("quantizer.scale"):
            array = np.float32(0.4) + np.float32(0.01) * array
        elif name.endswith("quantizer.zero_point"):
            array = np.float32(7.5) + np.float32(0.3) * array
        yield name, array.astype(spec.dtype)


def measure(command: list[str], source: Path) -> tuple[float, float, float]:
    """Seconds until the result is on disk, CPU seconds, and the peak resident memory in MB."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    os.sync()
    busy = usage.ru_utime + usage.ru_stime
    return time.monotonic() - start, busy, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("mode", choices=["sparse", "random", "released"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=40)
    arguments = parser.parse_args()
    config = WanConfig(num_layers=arguments.layers)
    root = Path(tempfile.mkdtemp(prefix="convert_memory_", dir=arguments.folder))
    source, imported = root / "source", root / "imported"
    convert = [sys.executable, "-m", "convert"]
    steps = {"import": [*convert, "import", str(source), str(imported)]}
    if arguments.mode == "random":
        steps = {
            "cp": ["cp", "-r", str(source), str(root / "copy")],
            **steps,
            "verify": [*convert, "verify", str(source), str(imported)],
            "export": [*convert, "export", str(imported), str(root / "back")],
        }
    if arguments.mode == "released":
        words = [str(source), str(imported), "--base", str(root / "base")]
        steps = {
            "import": [*convert, "import", *words, "--released-step", "444"],
            "verify": [*convert, "verify", *words],
        }
    try:
        if arguments.mode == "released":
            largest = write_released(source, root / "base", config)
        else:
            largest = write_source(source, config, arguments.mode == "random")
        files = list(source.rglob("*.safetensors"))
        nbytes = sum(path.stat().st_size for path in files)
        print(
            f"{arguments.mode}, {arguments.layers} layers: {nbytes:,} bytes in {len(files)} files"
        )
        if arguments.mode == "released":
            print(f"largest tensor: {largest:,} bytes")
        else:
            print(f"bound on memory: 2 x {largest:,} + 1 GB = {(2 * largest + 1e9) / 1e6:,.0f} MB")
        for name, command in steps.items():
            seconds, busy, peak = measure(command, imported if name == "export" else source)
            rate = nbytes / seconds / 1e6
            memory = "" if name == "cp" else f", peak {peak:,.0f} MB"
            print(
                f"{name:>7}: {seconds:6.1f} s ({busy:.1f} s of CPU), {rate:5.0f} MB/s{memory}",
                flush=True,
            )
            shutil.rmtree(root / "copy", ignore_errors=True)
        if arguments.mode == "random":
            for path in files:
                subprocess.run(["cmp", path, root / "back" / "transformer" / path.name], check=True)
            print("the exported files equal the source's byte for byte")
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
