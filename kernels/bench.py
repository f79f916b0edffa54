"""Times the low-bit products of real models on this machine, beside bf16 in the same run.

    python -m kernels.bench                       # every shape, every backend of this device
    python -m kernels.bench --quick               # a minute on two CPU cores
    python -m kernels.bench --model Wan-1.3B --rows 2048 --out result.json

Every line is the median of the repeats after warm-up, each waiting for its result; of fewer than
30 the line says how many they were. `linear` is the
product with the quantization of its tokens, as a model calls it; `product` has tokens ready. The
ratios are to `jnp.dot` of the same shape in bf16, and in float32 on a CPU, which has no bf16 unit.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kernels.chips import Chip, chip_of
from kernels.choose import candidates, layout_of, module_of
from kernels.floor import least_seconds, unit_of
from kernels.layouts import lay_out
from kernels.operands import Product, Weight
from kernels.quantize_tokens import quantize_tokens
from kernels.quantized_matmul import quantize_and_matmul, quantized_matmul
from kernels.shapes import SHAPES, Shape
from kernels.weight_only_matmul import weight_only_matmul

_ENOUGH = 30
_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "libtpu", "torch")


def median_seconds(call: Callable[[], Any], repeats: int, budget: float) -> tuple[float, int]:
    """Median of up to `repeats` calls after two of warm-up, and how many there were.

    Stops early once `budget` seconds are gone; a call that takes as long is made twice, the first
    time to warm up.
    """

    def timed() -> float:
        began = time.perf_counter()
        jax.block_until_ready(call())
        return time.perf_counter() - began

    if timed() < budget:
        timed()
    times = [timed()]
    while len(times) < repeats and sum(times) < budget:
        times.append(timed())
    return statistics.median(times), len(times)


def operands(product: Product, layout: str) -> tuple[jax.Array, Weight]:
    """Normal tokens, and a weight in a backend's layout."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (product.rows, product.inner), jnp.bfloat16)
    half = 2 ** (product.weight_bits - 1)
    shape = (product.inner, product.columns)
    codes = jax.random.randint(keys[1], shape, -half, half, jnp.int8)
    scale = jax.random.uniform(keys[2], (product.columns,), jnp.float32, 0.01, 0.02)
    zero_point = jax.random.uniform(keys[3], (product.columns,), jnp.float32, -1, 1)
    code_sum = jnp.sum(codes, 0, dtype=jnp.int32).astype(jnp.float32)
    laid = jax.block_until_ready(lay_out(codes, product.weight_bits, layout))
    return x, Weight(laid, scale, zero_point, code_sum, jnp.zeros_like(scale))


def low_bit_calls(product: Product, chip: Chip) -> Iterator[tuple[str, Callable, tuple, int]]:
    """(name, function, arguments, bytes of the weight) of what this device can run."""
    one, levels = jnp.float32(0.95), jnp.float32(2**product.act_bits - 1)
    name = f"W{product.weight_bits}A{product.act_bits}"
    for backend in candidates(chip):
        module, layout = module_of(backend), layout_of(backend, product, chip)
        x, weight = operands(product, layout)
        tokens = jax.jit(quantize_tokens)(x, one, one, levels)
        try:
            module.check(product, chip)
            if backend != "xla":
                # Asked itself: through the dispatcher XLA would be timed under its name.
                how = {"bits": (product.weight_bits, product.act_bits)}
                alone = partial(module.quantized_matmul, **how, out_dtype=product.out_dtype)
                jax.eval_shape(alone, tokens, weight)
        except NotImplementedError as reason:
            print(f"  {backend} does not take {product}: {reason}", flush=True)
            continue
        how = {
            "backend": backend,
            "layout": layout,
            "bits": (product.weight_bits, product.act_bits),
            "out_dtype": product.out_dtype,
        }
        size = weight.codes.on_device_size_in_bytes()
        yield f"{name} {backend} product", partial(quantized_matmul, **how), (tokens, weight), size
        linear = partial(quantize_and_matmul, **how)
        yield f"{name} {backend} linear", linear, (x, one, one, levels, weight), size
    if product.weight_bits == 4:
        layout = layout_of("xla", product, chip)
        x, weight = operands(product, layout)
        call = partial(weight_only_matmul, layout=layout, out_dtype=product.out_dtype)
        size = weight.codes.on_device_size_in_bytes()
        yield "W4A16 xla", call, (x, weight), size


def full_precision_calls(
    product: Product, chip: Chip
) -> Iterator[tuple[str, Callable, tuple, int]]:
    """The same of what a product without quantization would be."""
    dtypes = (jnp.float32, jnp.bfloat16) if chip.platform == "cpu" else (jnp.bfloat16,)
    keys = jax.random.split(jax.random.key(1))
    for dtype in dtypes:
        x = jax.random.normal(keys[0], (product.rows, product.inner), dtype)
        w = jax.random.normal(keys[1], (product.inner, product.columns), dtype)
        yield f"{jnp.dtype(dtype).name} jnp.dot", jnp.dot, (x, w), w.on_device_size_in_bytes()


def time_torch(product: Product, repeats: int, budget: float) -> dict[str, tuple[float, int]]:
    """torch's own products of the same shape, where torch is installed."""
    try:
        import torch
    except ImportError:
        return {}
    cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    if jax.default_backend() == "gpu" and not cuda:
        return {}
    device, found = ("cuda" if cuda else "cpu"), {}
    for dtype in (torch.bfloat16,) if cuda else (torch.float32, torch.bfloat16):
        x = torch.randn(product.rows, product.inner, dtype=dtype, device=device)
        w = torch.randn(product.inner, product.columns, dtype=dtype, device=device)

        def call(x=x, w=w):
            y = x @ w
            if cuda:
                torch.cuda.synchronize()
            return y

        found[f"torch {str(dtype).removeprefix('torch.')}"] = median_seconds(call, repeats, budget)
    return found


def run_shape(
    shape: Shape, bits: Sequence[tuple[int, int]], repeats: int, budget: float, torch: bool
) -> list[dict]:
    """Everything about one shape, as records."""
    chip = chip_of(jax.devices()[0])
    plain = Product(shape.rows, shape.inner, shape.columns)
    records = []

    def add(name: str, seconds: float, count: int, floor: float | None, **more: Any) -> None:
        records.append(
            {
                **shape._asdict(),
                "call": name,
                "ms": 1e3 * seconds,
                "repeats": count,
                "tera_operations": 2 * shape.multiply_adds / seconds / 1e12,
                "share_of_floor": None if floor is None else floor / seconds,
                **more,
            }
        )

    def measure(calls: Iterator, product: Product, unit_for: Callable[[str], str]) -> None:
        for name, call, arguments, size in calls:
            compiled = jax.jit(call).lower(*arguments).compile()
            analysis = compiled.memory_analysis()
            temporaries = None if analysis is None else analysis.temp_size_in_bytes
            seconds, count = median_seconds(partial(compiled, *arguments), repeats, budget)
            per_code = size / (shape.inner * shape.columns)
            floor = least_seconds(product, chip, unit_for(name), per_code)
            add(name, seconds, count, floor, weight_bytes=size, temporary_bytes=temporaries)

    measure(full_precision_calls(plain, chip), plain, lambda name: "bf16")
    if torch:
        for name, (seconds, count) in time_torch(plain, repeats, budget).items():
            add(name, seconds, count, None)
    for pair in bits:
        product = plain._replace(weight_bits=pair[0], act_bits=pair[1])

        def unit(name: str, product: Product = product) -> str:
            return "bf16" if "A16" in name else unit_of(name.split()[1], product, chip)

        measure(low_bit_calls(product, chip), product, unit)
    base = {record["call"]: record["ms"] for record in records}
    for record in records:
        record["to_bf16"] = base["bfloat16 jnp.dot"] / record["ms"]
        if "float32 jnp.dot" in base:
            record["to_float32"] = base["float32 jnp.dot"] / record["ms"]
    return records


def versions() -> dict[str, str]:
    """Of what takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def processor() -> str:
    """The CPU's model and what of it decides the speed of integers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    kinds = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in flags]
    return f"{fields.get('model name', platform.processor())} ({', '.join(kinds)})"


def device_name() -> str:
    """What JAX computes on here."""
    device = jax.devices()[0]
    return processor() if device.platform == "cpu" else device.device_kind


def print_records(records: Sequence[dict]) -> None:
    """A table of one shape."""
    first = records[0]
    sizes = f"{first['rows']} x {first['inner']} x {first['columns']}"
    print(f"{first['model']}, {first['layer']}: {sizes}", flush=True)
    for r in records:
        ratios = f"{r['to_bf16']:6.2f}x bf16"
        if "to_float32" in r:
            ratios += f" {r['to_float32']:6.2f}x float32"
        share = (
            "" if r["share_of_floor"] is None else f" {100 * r['share_of_floor']:4.0f} % of floor"
        )
        weight = f" {r['weight_bytes'] / 1e6:8.1f} MB" if "weight_bytes" in r else ""
        speed = f"{r['ms']:10.3f} ms {r['tera_operations']:8.3f} TOP/s"
        few = f" of {r['repeats']} repeats" if r["repeats"] < _ENOUGH else ""
        print(f"  {r['call']:24s}{speed} {ratios}{share}{weight}{few}", flush=True)


def arguments_of(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line's, with the `shapes` that were asked for and `bits` as pairs of numbers.

    Raises:
        ValueError: something that cannot be timed or written.
    """
    parser = argparse.ArgumentParser(
        prog="python -m kernels.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="Wan-1.3B alone, 512 rows, W4A4")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    parser.add_argument("--rows", type=int, help="tokens, instead of a whole video's")
    parser.add_argument("--repeats", type=int, default=_ENOUGH)
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds for each call's repeats"
    )
    parser.add_argument("--bits", default="4,4 3,3 4,8 8,8", help='pairs, such as "4,4 8,8"')
    parser.add_argument("--torch", action="store_true", help="torch's products too, if installed")
    parser.add_argument("--out", type=Path, help="write JSON there too")
    asked = parser.parse_args(argv)
    for name in ("rows", "repeats", "budget"):
        value = getattr(asked, name)
        if value is not None and not value > 0:  # Nor is nan.
            raise ValueError(f"--{name} {value}: must be positive")
    if asked.quick:
        asked.model = asked.model or "Wan-1.3B"
        asked.rows = 512 if asked.rows is None else asked.rows
        asked.bits, asked.budget = "4,4", min(asked.budget, 3.0)
    asked.bits = _pairs(asked.bits)
    asked.shapes = _cut(asked.model, asked.rows)
    if asked.out is not None:
        _check_writable(asked.out)
    return asked


def _pairs(text: str) -> list[tuple[int, ...]]:
    try:
        pairs = [tuple(map(int, pair.split(","))) for pair in text.split()]
        good = pairs and all(len(pair) == 2 and min(pair) > 1 and max(pair) < 9 for pair in pairs)
    except ValueError:
        good = False
    if not good:
        raise ValueError(f'--bits {text!r}: expected pairs of 2 to 8, such as "4,4 8,8"')
    return pairs


def _cut(model: str, rows: int | None) -> list[Shape]:
    """A model's shapes, of so many rows where they have as many."""
    shapes = [shape for shape in SHAPES if model in shape.model]
    if not shapes:
        names = ", ".join(sorted({shape.model for shape in SHAPES}))
        raise ValueError(f"--model {model!r}: no such model, there are {names}")
    most = max(shape.rows for shape in shapes)
    if rows is None:
        return shapes
    if rows > most:
        raise ValueError(f"--rows {rows}: no video asked for has more than {most}")
    for shape in shapes:
        if shape.rows < rows:
            print(f"{shape.model}, {shape.layer}: all its {shape.rows} rows, which are fewer")
    return [shape._replace(rows=min(rows, shape.rows)) for shape in shapes]


def _check_writable(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise ValueError(f"--out {path}: {error.strerror}; name a file to write") from error


def main(argv: Sequence[str] | None = None) -> int:
    try:
        arguments = arguments_of(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    kind = device_name()
    header = {
        "command": "python -m kernels.bench "
        + " ".join(argv if argv is not None else sys.argv[1:]),
        "device": kind,
        "versions": versions(),
    }
    print(f"{kind}; {', '.join(f'{k} {v}' for k, v in header['versions'].items())}")
    records: list[dict] = []
    for shape in arguments.shapes:
        how = (arguments.bits, arguments.repeats, arguments.budget, arguments.torch)
        found = run_shape(shape, *how)
        print_records(found)
        records += found
        if arguments.out:  # After every shape: an interrupted run leaves what it has.
            arguments.out.write_text(json.dumps({**header, "records": records}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
