"""What a finished run ends with: the comparison, the pairs of videos, the sizes, the report."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors import safe_open

from qvgen_jax.evaluation import drift
from qvgen_jax.evaluation.evaluate import REFERENCE, Variant, evaluate_variants
from qvgen_jax.evaluation.report import write_report
from qvgen_jax.evaluation.samples import load_to_generate, write_pairs
from qvgen_jax.evaluation.table import table
from qvgen_jax.models import TransformerConfig, quantizable, time_only
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.quant.blocks import bits_label
from qvgen_jax.quant.initialize import round_to_nearest
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.packed import STEP_LEAVES, read_quantization_config
from qvgen_jax.training.student import quant_config, student_definition

_PACKED = ("codes", "scale", "zero_point", "clips", "smooth", "L", "R", *STEP_LEAVES)


def untrained(config: Mapping, pipe: Pipeline) -> Pipeline:
    """Round-to-nearest at the config's bits: min-max ranges, no rotation, nothing learned."""
    model: TransformerConfig = pipe.transformer.config
    plain = {**config["quant"], "act_range": "token", "rotation": "none", "smoothing": 0.0}
    quant = quant_config(plain, model)
    params, levels = round_to_nearest(pipe.transformer.states[0], quantizable(model), quant)
    dtype = jnp.dtype(config["compute_dtype"])
    definition = student_definition(model, quant, dtype, branch=False)
    return pipe.with_transformer(definition, params, levels)


def measure_sizes(teacher: Pipeline, export: Path) -> dict[str, Any]:
    """Bytes of the transformer before (as bf16) and after, whole and its quantized linears alone.

    Biases are left out of the linears on both sides: they are the same. Linears that became a time
    table are a row of their own, with the biases that the table holds.
    """
    path = export / "transformer" / "diffusion_pytorch_model.safetensors"
    packed = full = 0
    with safe_open(path, framework="numpy") as file:
        present = set(file.keys())
        names = [name for name in sorted(present) if name.endswith(".codes")]
        for name in names:
            stem = name.removesuffix("codes")
            held = [stem + leaf for leaf in _PACKED if stem + leaf in present]
            packed += sum(file.get_tensor(name).nbytes for name in held)
    params = teacher.transformer.states[0]
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    model = teacher.transformer.config
    fields = json.loads((export / "transformer" / "config.json").read_text())
    quant = read_quantization_config(fields["quantization_config"])
    for name in quant.quantized(quantizable(model)):
        full += layer_at(params, name)["kernel"].size
    sizes = {
        "transformer_bf16_bytes": 2 * total,
        "transformer_export_bytes": path.stat().st_size,
        "linears_bf16_bytes": 2 * full,
        "linears_export_bytes": packed,
        "linears": len(names),
    }
    if not quant.time_table:
        return sizes
    replaced = sum(
        leaf.size for name in time_only(model) for leaf in layer_at(params, name).values()
    )
    with safe_open(path, framework="numpy") as file:
        tables = [name for name in file.keys() if name.endswith(".table")]  # noqa: SIM118
        stored = sum(file.get_tensor(name).nbytes for name in (*tables, "timesteps"))
    row = {"name": "Its timestep linears, as a table"}
    return sizes | {"rows": [row | {"bf16_bytes": 2 * replaced, "export_bytes": stored}]}


def compare_and_report(
    config: Mapping, workdir: Path, teacher: Pipeline, part: tuple[int, int] = (0, 1)
) -> Path | None:
    """Evaluate teacher, round-to-nearest and the export; write everything; the report's path.

    Nothing is evaluated where `evaluate.videos` is 0. What `evaluation.drift` measures is asked for
    by `evaluate.held_out` and `evaluate.drift_videos`.

    Args:
        config: the run's.
        workdir: of a run with an export.
        teacher: the full-precision pipeline.
        part: of the videos to evaluate, see `evaluate_variants`; the one that ends last does what
            follows, for the others the result is None.
    """
    student = load_to_generate(config, workdir / "export")
    if config["evaluate"]["videos"]:
        result = _evaluate(config, workdir, teacher, student, part)
        if result is None:
            return None
        print(table(result), flush=True)
    drift.measure(config, workdir, teacher, student)
    if config["sample"]["count"]:
        write_pairs(config, workdir, teacher, student)
    sizes = measure_sizes(teacher, workdir / "export")
    (workdir / "sizes.json").write_text(json.dumps(sizes, indent=1))
    return write_report(workdir)


def untrained_name(config: Mapping) -> str:
    """Of round-to-nearest, in tables."""
    return f"Round-to-nearest {_bits(config)}"


def _bits(config: Mapping) -> str:
    quant = config["quant"]
    # Runs from before there were other bits.
    return bits_label(quant["weight_bits"], quant["act_bits"], quant.get("bits", ()))


def _evaluate(
    config: Mapping, workdir: Path, teacher: Pipeline, student: Pipeline, part: tuple[int, int]
) -> dict | None:
    variants = {REFERENCE: Variant(lambda: teacher)}
    if config["evaluate"]["round_to_nearest"]:
        nearest = untrained(config, teacher)
        variants[untrained_name(config)] = Variant(lambda: nearest)
    name = config.get("method", "QVGen")  # Runs from before there were other methods.
    variants[f"{name} {_bits(config)}"] = Variant(lambda: student, packed=True)
    return evaluate_variants(config, workdir, variants, part)
