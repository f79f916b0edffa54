"""A packed transformer of ours under the release's names, for the release's scripts.

    python inference/wan.py --quant --quant_model_path TARGET --w_bit 4 --act_bit 4 --use_aq \
        --w_quantizer lsq+ --act_quantizer learnable_clipped_dynamic [--fix] ...

Their code knows one number of bits for all layers, 50 clip pairs chosen by counting calls, ranges
that need not contain 0, and a constant clip of 0.95 on top of the learned ones.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from convert import progress as partials
from convert import released_arithmetic as arithmetic
from convert.names import check_names, in_ranges
from convert.released import WEIGHTS, copy_cards
from convert.released_names import (
    SCALE,
    Linear,
    linears_of,
    other_shapes,
    quantized_shapes,
    recipe_of,
)
from convert.safetensors_writer import Spec, write_stream
from convert.save import write_json
from convert.tensors import Tensors, read_json
from convert.travel import Report, check_target, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json
from qvgen_jax.quant.code_planes import unpack_codes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.packed import leaves_of, read_quantization_config

_BUCKETS, _CLIP_RATIO = 50, 0.95
_FLOAT32 = np.dtype(np.float32)
_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": _FLOAT32}
# The sigmoid of this is 1 in float32.
_OPEN = np.float32(20.0)


def export_released(
    source: str | Path,
    target: str | Path,
    *,
    dtype: str = "bfloat16",
    approximate: bool = False,
    progress: Report = silent,
) -> int:
    """Writes a folder that the release's scripts load as `--quant_model_path`.

    The file holds weights that their quantizer rounds to our codes, which is checked for every one
    of them. In float32 they then compute our forward; in bfloat16, their scripts' type, scales and
    zero points are rounded to it.

    Args:
        source: a pipeline with a packed transformer, or the transformer's folder.
        target: the folder to make.
        dtype: of the quantized linears' tensors: `bfloat16` or `float32`.
        approximate: write even what their code will compute differently: ranges widened to contain
            0, clips chosen by the timestep, clips above 0.95. Refused otherwise.
        progress: told after every tensor.

    Returns:
        The bytes of the weights.

    Raises:
        UserError: the source is not packed, or is something that their code cannot express; all
            reasons are named at once. Or the target exists, or `TARGET.partial` is another
            conversion's.
    """
    source, target = Path(source), Path(target)
    if dtype not in _DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}")
    check_target(source, target, f"{target} {source} --base BASE")
    folder = source / "transformer" if (source / "transformer").is_dir() else source
    fields = read_json(folder / "config.json")
    if not fields.get("quantization_config"):
        raise UserError(
            f"{folder} is in full precision; their scripts run quantized ones: train it, or import "
            "a released checkpoint"
        )
    quant = read_quantization_config(fields.pop("quantization_config"))
    if quant.time_table:
        raise UserError(
            f"the release's code cannot run {folder}: its timestep linears are a table, their code "
            "has no place for one and needs the linears; export a run with quant.time_table=False"
        )
    _refuse_impossible(quant)
    config = config_from_json(fields)
    linears = linears_of(config)
    kept = [x for name in quant.full_precision for x in linears.pop(name)]
    others = (*other_shapes(config), *(f"{x.stem}.weight" for x in kept))
    others += tuple(f"{x.stem}.bias" for x in kept if x.bias)
    quantized = [linear for group in linears.values() for linear in group]
    tensors = Tensors(folder)
    leaves = [
        f"{linear.stem}.{leaf}"
        for name, group in linears.items()
        for linear in group
        for leaf in leaves_of(quant, name)
        if leaf != "bias" or linear.bias
    ]
    check_names((*leaves, *others), tensors)
    exporter = _Exporter(
        tensors, quant, quantized, others, recipe_of(config).float32, _DTYPES[dtype]
    )
    differences = exporter.differences()
    if differences and not approximate:
        raise UserError(
            "the release's code would compute this model differently: "
            f"{'; '.join(differences)}; to write it all the same, add --approximate"
        )

    task = {"task": "export released", "source": str(source.resolve())}
    partial = partials.start_over(target, task)
    write_json(partial / "config.json", fields)
    for place in dict.fromkeys((source, folder)):
        copy_cards(place, partial)
    size = write_stream(partial / WEIGHTS, exporter.specs(), exporter.arrays(), progress)
    partials.finish(partial, target)
    return size


def _refuse_impossible(quant: QuantConfig) -> None:
    impossible = []
    if quant.rank:
        remedy = "import it without --released-step"
        if quant.branch_input == "tokens":
            remedy = "quantize it by another method than svdquant"
        impossible.append(f"it has a low-rank branch ({remedy})")
    if quant.bits:
        impossible.append(
            f"layers have bits of their own: {', '.join(sorted(quant.bits))} (train with "
            "--config.quant.bits=())"
        )
    if quant.symmetric_weights:
        impossible.append(
            "its weights are symmetric and hold no zero points (train with "
            "--config.quant.symmetric_weights=False)"
        )
    if quant.rotation != "none":
        impossible.append(
            "its tokens are rotated before they are quantized (train with "
            "--config.quant.rotation=none)"
        )
    if quant.smoothing:
        impossible.append(
            "its tokens are smoothed before they are quantized (train with "
            "--config.quant.smoothing=0)"
        )
    if quant.learned_steps:
        impossible.append(
            "its activations have learned steps, no ranges of their own (train with "
            "--config.quant.act_range=token)"
        )
    if quant.buckets not in (1, _BUCKETS):
        impossible.append(
            f"it has {quant.buckets} clip pairs per layer, theirs has {_BUCKETS} (train with "
            f"buckets=1 or {_BUCKETS})"
        )
    if impossible:
        raise UserError(f"the release's code cannot run this model: {'; '.join(impossible)}")


@dataclass(frozen=True)
class _Exporter:
    """Reads the packed transformer linear by linear and writes it as theirs.

    Attributes:
        others: names of what is only copied.
        float32: parts of the names of the layers that the release computes in float32.
        dtype: of all other quantized linears.
    """

    tensors: Tensors
    quant: QuantConfig
    quantized: list[Linear]
    others: tuple[str, ...]
    float32: tuple[str, ...]
    dtype: np.dtype

    def differences(self) -> list[str]:
        """What their code will compute differently, in words."""
        found = []
        if self.quant.include_zero:
            found.append("tokens that lie on one side of 0 have their range widened to it")
        moving, open_wide = [], []
        for linear in self.quantized:
            clips = self._clips(linear)
            if np.any(clips != clips[:1]):
                moving.append(f"{linear.stem}.clips")
            if np.any(clips >= _OPEN):
                open_wide.append(f"{linear.stem}.clips")
        if moving and self.quant.clip_index == "bucket":
            found.append(f"the timestep chooses the clips, theirs count calls: {in_ranges(moving)}")
        if open_wide:
            found.append(f"clips keep more than {_CLIP_RATIO} of a range: {in_ranges(open_wide)}")
        return found

    def _clips(self, linear: Linear) -> np.ndarray:
        """Lower and upper clips float32 `[50, 2]`, such that 0.95 times their sigmoid is ours."""
        clips = self.tensors[f"{linear.stem}.clips"].astype(np.float32)
        if self.quant.clip_ratio != _CLIP_RATIO:
            kept = self.quant.clip_ratio / _CLIP_RATIO / (1 + np.exp(-clips.astype(np.float64)))
            with np.errstate(divide="ignore", invalid="ignore"):
                logit = np.log(kept) - np.log1p(-kept)
            clips = np.where(kept < 1, logit, _OPEN).astype(np.float32)
        return np.broadcast_to(clips, (_BUCKETS, 2)) if len(clips) == 1 else clips

    def _dtype(self, linear: Linear) -> np.dtype:
        return _FLOAT32 if set(linear.stem.split(".")) & set(self.float32) else self.dtype

    def specs(self) -> dict[str, Spec]:
        """Every tensor of their file."""
        infos = self.tensors.infos
        specs = {name: Spec(infos[name].dtype, infos[name].shape) for name in self.others}
        for linear in self.quantized:
            for leaf, shape in quantized_shapes(linear, _BUCKETS).items():
                dtype = _FLOAT32 if leaf.startswith("aquantizer") else self._dtype(linear)
                specs[f"{linear.stem}.{leaf}"] = Spec(dtype, shape)
        return specs

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `specs`, each made when it is asked for."""
        for name in self.others:
            yield name, self.tensors[name]
        for linear in self.quantized:
            for leaf, array in self._unpack(linear).items():
                yield f"{linear.stem}.{leaf}", array

    def _unpack(self, linear: Linear) -> dict[str, np.ndarray]:
        bits, dtype = self.quant.weight_bits, self._dtype(linear)
        codes = unpack_codes(self.tensors[f"{linear.stem}.codes"], bits, linear.fan_in)
        size = linear.fan_in, bits, dtype
        scale, zero_point = (
            arithmetic.stored(self.tensors[f"{linear.stem}.{leaf}"][:, None], *size)
            for leaf in ("scale", "zero_point")
        )
        weight = arithmetic.dequantize(codes, scale, zero_point, bits, dtype)
        again = arithmetic.quantize(weight, scale, zero_point, bits, dtype).codes
        if np.any(again != codes):
            raise UserError(
                f"{linear.stem}: {np.count_nonzero(again != codes)} codes do not survive {dtype}, "
                "because a zero point is far outside the codes; export as float32"
            )
        clips = self._clips(linear)
        tensors = {
            "w": weight,
            SCALE: scale,
            "wquantizer.zero_point": zero_point,
            "aquantizer.lower": clips[:, 0],
            "aquantizer.upper": clips[:, 1],
        }
        bias = {"b": self.tensors[f"{linear.stem}.bias"].astype(dtype)} if linear.bias else {}
        return tensors | bias
