"""Products compiled for a TPU that is not attached, and the machine code that came out.

libtpu compiles without a device and writes its schedule of bundles on request, but reads that
request once, when it starts: hence a process per chip.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
"""Of each chip, the smallest that libtpu knows."""

ALONE = {
    "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
"""Environment of a process in which libtpu compiles, beside others and without a TPU."""


class Case(NamedTuple):
    """One product to compile.

    Attributes:
        kernel: `codes` (`kernels.tpu.quantized_matmul`), `tokens` (`quantize_and_matmul`) or `xla`
            (`kernels.xla.quantized_matmul` of int8 codes).
        rows, inner, columns: its shape.
        weight_bits, act_bits: of the two Pallas kernels.
        x_dtype: of `tokens`.
        tile: the kernel's rows, columns and slice; chosen if None.
    """

    kernel: str
    rows: int
    inner: int
    columns: int
    weight_bits: int = 4
    act_bits: int = 4
    x_dtype: str = "bfloat16"
    tile: tuple[int, int, int] | None = None


class Compiled(NamedTuple):
    """What the compiler made of a case.

    Attributes:
        error: why it could not; empty if it could.
        seconds: that it took.
        bundles: the schedules of its operations, by name, in libtpu's notation.
    """

    error: str
    seconds: float
    bundles: dict[str, str]


def compile_for(chip: str, cases: list[Case]) -> list[Compiled]:
    """Compiles in a process of its own.

    Raises:
        RuntimeError: the process failed, as where libtpu is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder}/dump --xla_jf_dump_llo_text=true "
            "--xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        done = subprocess.run(
            [sys.executable, "-m", "kernels.tpu_ahead", chip, folder, json.dumps(cases)],
            env={**os.environ, **ALONE, "LIBTPU_INIT_ARGS": flags},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise RuntimeError(f"compiling for {chip} failed:\n{done.stderr[-3000:]}")
        return [_read(Path(folder, str(n))) for n in range(len(cases))]


def _read(folder: Path) -> Compiled:
    found = json.loads((folder / "compiled.json").read_text())
    # <time>-<operation>-<number>-final_bundles.txt, and an analysis that we do not want.
    schedules = {
        path.name.split("-", 1)[1].rsplit("-", 2)[0]: path.read_text()
        for path in sorted(folder.glob("*-final_bundles.txt"))
        if not path.name.endswith("schedule-analysis_final_bundles.txt")
    }
    return Compiled(found["error"], found["seconds"], schedules)


def _compile_here(chip: str, folder: Path, cases: list[Case]) -> None:
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices[0]
    for number, case in enumerate(cases):
        lowered = _lower(chip, case, SingleDeviceSharding(device))
        start, error = time.perf_counter(), ""
        try:
            lowered.compile()
        except Exception as reason:
            # The compiler's refusals have no type of their own.
            error = f"{type(reason).__name__}: {reason}"
        seconds = time.perf_counter() - start
        into = folder / str(number)
        into.mkdir()
        (into / "compiled.json").write_text(json.dumps({"error": error, "seconds": seconds}))
        for path in (folder / "dump").glob("*"):
            path.rename(into / path.name)


def _lower(chip: str, case: Case, sharding):
    import jax
    import jax.numpy as jnp

    from kernels import tpu, xla
    from kernels.chips import named
    from kernels.operands import Weight
    from kernels.quantize_tokens import QuantizedTokens
    from kernels.tpu_tiles import Tile

    def array(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    rows, inner, columns = case.rows, case.inner, case.columns
    small = case.weight_bits <= 4 and case.kernel != "xla"
    codes = array((inner, columns), jnp.int4 if small else jnp.int8)
    weight = Weight(codes, *[array((columns,), jnp.float32)] * 4)
    tokens = QuantizedTokens(array((rows, inner), jnp.int8), *[array((rows, 1), jnp.float32)] * 3)
    how = dict(
        bits=(case.weight_bits, case.act_bits),
        chip=named(chip),
        tile=None if case.tile is None else Tile(*case.tile),
    )
    if case.kernel == "xla":
        run = jax.jit(lambda t, w: xla.quantized_matmul(t, w, out_dtype=jnp.bfloat16))
        return run.lower(tokens, weight)
    if case.kernel == "codes":
        return jax.jit(lambda t, w: tpu.quantized_matmul(t, w, **how)).lower(tokens, weight)
    clip = array((rows, 1), jnp.float32)
    levels = jnp.float32(2**case.act_bits - 1)
    run = jax.jit(lambda x, a, b, w: tpu.quantize_and_matmul(x, a, b, levels, w, **how))
    return run.lower(array((rows, inner), jnp.dtype(case.x_dtype)), clip, clip, weight)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The process that compile_for starts.")
    parser.add_argument("chip", choices=TOPOLOGIES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", type=json.loads)
    asked = parser.parse_args()
    _compile_here(asked.chip, asked.folder, [Case(*case) for case in asked.cases])
