"""What a quantization tells: a line per stage while it goes on, `quantize.json` at its end."""

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from qvgen_jax.ptq.engine import Done, Tensors
from qvgen_jax.quant.blocks import in_block

_KINDS = {
    "codes": ("codes",),
    "ranges": ("scale", "zero_point", "clips"),
    "branch": ("L", "R"),
    "smoothing": ("smooth",),
}
"""What a linear's tensors are counted as; biases are not, full precision has them too."""


class Told:
    """A line per finished stage, with the time left.

    Args:
        stages: all there are.
        what: such as "svdquant W4A4".
    """

    def __init__(self, stages: int, what: str):
        self._stages, self._what, self._done = stages, what, 0
        self._start = time.monotonic()

    def __call__(self, done: Done, was_there: bool) -> None:
        """One is done; or was done by an earlier call, and only run again."""
        self._done += 1
        outputs = [each["output"] for each in done.errors.values()]
        lost = f", outputs off by {np.mean(outputs):.3f}" if outputs else ""
        took = "found" if was_there else f"{sum(done.seconds.values()):.1f} s"
        each = (time.monotonic() - self._start) / self._done
        left = each * (self._stages - self._done)
        ahead = f"; {left / 60:.1f} min left" if left else ""
        print(
            f"{self._what}: {done.stage} ({self._done} of {self._stages}), {took}{lost}{ahead}",
            flush=True,
        )


def bytes_by_kind(layers: Iterable[Mapping[str, np.ndarray]]) -> dict[str, int]:
    """Bytes of packed linears: codes, ranges (clips with them), branch, smoothing."""
    found = dict.fromkeys(_KINDS, 0)
    for layer in layers:
        for kind, leaves in _KINDS.items():
            found[kind] += sum(layer[leaf].nbytes for leaf in leaves if leaf in layer)
    return found


def measured(done: Sequence[Done], parameters: int, export: Path) -> dict:
    """Errors, seconds and bytes of finished stages.

    Args:
        done: all stages.
        parameters: of the quantized kernels.
        export: the folder that was written.
    """
    layers = {
        in_block(name, each.stage.block): {key: round(value, 6) for key, value in told.items()}
        for each in done
        for name, told in each.errors.items()
    }
    outputs = [told["output"] for told in layers.values()]
    seconds: dict[str, float] = {}
    for each in done:
        for key, value in each.seconds.items():
            seconds[key] = round(seconds.get(key, 0.0) + value, 3)
    tensors: list[Tensors] = [each.tensors for each in done]
    kinds = bytes_by_kind(layer for stage in tensors for layer in stage.values())
    weights = export / "transformer" / "diffusion_pytorch_model.safetensors"
    return {
        "mean_output_error": round(float(np.mean(outputs)), 6) if outputs else None,
        "stage_seconds": seconds,
        "linears_bf16_bytes": 2 * parameters,
        "linears_bytes": kinds,
        "transformer_export_bytes": weights.stat().st_size,
        "layers": layers,
    }


def peak_memory() -> dict[str, int | None]:
    """Bytes that this process has held at most, on its first device (if that tells) and here."""
    stats = jax.local_devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"peak_device_bytes": stats.get("peak_bytes_in_use"), "peak_host_bytes": host}
