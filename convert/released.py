"""A checkpoint of QVGen's release to a packed pipeline of ours."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convert import progress as partials
from convert import released_arithmetic as arithmetic
from convert.load import find_folder
from convert.released_names import (
    SCALE,
    Linear,
    ReleasedPlan,
    is_released,
    plan_released,
    recipe_of,
)
from convert.released_options import ReleasedOptions
from convert.safetensors_writer import Spec, write_stream
from convert.save import write_json
from convert.tensors import Tensors, check_inside, read_json
from convert.travel import Report, check_companions, check_target, copy_companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, config_from_json
from qvgen_jax.quant.code_planes import packed_bytes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.packed import pack_tensors, quantization_config
from qvgen_jax.quant.schedule import RankDecay, phase_rank

WEIGHTS = "diffusion_pytorch_model.safetensors"
_FLOAT32 = np.dtype(np.float32)
_CARDS = ("LICENSE*", "LICENCE*", "NOTICE*", "README.md")
# Shares of a whole model's codes that no trained range of the right number of bits comes near.
_MOST_CLIPPED, _LEAST_UPPER = 0.4, 0.05


def import_released(
    source: str | Path,
    base: str | Path,
    target: str | Path,
    *,
    clip_index: str = "countdown",
    bits: tuple[int, int] = (4, 4),
    released_step: int | None = None,
    phase_steps: int | None = None,
    lora_alpha: float | None = None,
    progress: Report = silent,
) -> int:
    """Writes a pipeline folder whose transformer is the checkpoint's, packed.

    Its forward is the release's: codes and activation ranges are computed in the checkpoint's own
    type, ranges need not contain 0, and the constant clip stands on top of the learned ones. Like
    their inference it leaves L and R away, unless `released_step` asks for them. The folder appears
    only when it is complete, and an interrupted call starts again; at any time one layer is in
    memory.

    Args:
        source: the checkpoint's folder (or its parent, with a `transformer/`), or a hub name.
        base: the full-precision pipeline it was trained from; everything else comes from there.
        target: the folder to make.
        clip_index: `countdown` is what their inference does with `--fix`, `last` what it does
            without, `t_mod_50` what they train with; see `qvgen_jax.quant.clips`.
        bits: of weights and activations; the file does not say them.
        released_step: how many steps the checkpoint had trained: rebuilds rank and gate of that
            step, and keeps the branch.
        phase_steps: T of that training; default the published recipe's of this family.
        lora_alpha: of an adapter checkpoint, merged with `lora_alpha / r`; their inference takes 1.
        progress: told after every tensor.

    Returns:
        The bytes of the packed transformer.

    Raises:
        UserError: checkpoint and base do not fit, an argument does not fit the checkpoint, the
            target exists, or `TARGET.partial` is another conversion's.
    """
    folder, base, target = checkpoint_folder(source), find_folder(base), Path(target)
    for origin in (base, folder):
        check_target(origin, target, f"{source} {target} --base {base}")
    check_companions(base)
    fields, config = read_base(folder, base)
    tensors = Tensors(folder)
    plan = plan_released(config, tensors.infos)
    options = ReleasedOptions(clip_index, bits, released_step, phase_steps, lora_alpha)
    decay = options.decay(plan, recipe_of(config).phase_steps)
    rank = 0 if decay is None else phase_rank(released_step, decay)
    quant = options.quant(plan, rank)
    importer = _Importer(
        tensors,
        plan,
        quant,
        float32=recipe_of(config).float32,
        moment=(released_step, decay) if rank else None,
        adapter_scale=options.adapter_scale(plan),
    )

    # Whatever the other arguments were: nothing of an interrupted call is used again.
    task = {"task": "import released", "source": str(folder.resolve()), "base": str(base.resolve())}
    partial = partials.start_over(target, task)
    copy_companions(base, partial)
    copy_cards(folder, partial / "transformer")
    fields = {**fields, "quantization_config": quantization_config(quant) | options.record(decay)}
    write_json(partial / "transformer" / "config.json", fields)
    specs = importer.specs()
    size = write_stream(partial / "transformer" / WEIGHTS, specs, importer.arrays(specs), progress)
    importer.check_bits()
    partials.finish(partial, target)
    return size


def copy_cards(source: Path, target: Path) -> None:
    """Copies the licence and the model card of a checkpoint's folder."""
    for file in cards(source):
        shutil.copy2(file, target / file.name)


def cards(source: Path) -> list[Path]:
    """The licence and the model card in a checkpoint's folder.

    Raises:
        UserError: one is a link to outside the folder.
    """
    files = [file for pattern in _CARDS for file in source.glob(pattern)]
    for file in files:
        check_inside(file, source)
    return files


def holds_released(source: str | Path) -> bool:
    """Whether a folder, or hub repository, holds a checkpoint in the release's naming.

    Raises:
        UserError: it cannot be found, or its files are damaged.
    """
    folder = checkpoint_folder(source)
    return bool(list(folder.glob("*.safetensors"))) and is_released(Tensors(folder).infos)


def checkpoint_folder(source: str | Path) -> Path:
    """Where a checkpoint's tensors lie: the folder, or the `transformer/` in it.

    Raises:
        UserError: it cannot be found.
    """
    folder = find_folder(source)
    inner = folder / "transformer"
    pipeline = (folder / "model_index.json").is_file() or not list(folder.glob("*.safetensors"))
    return inner if inner.is_dir() and pipeline else folder


def read_base(folder: Path, base: Path) -> tuple[dict[str, Any], TransformerConfig]:
    """The base transformer's config.json, and what it describes.

    Raises:
        UserError: it is packed, or a config.json beside the checkpoint is of another model.
    """
    fields = read_json(base / "transformer" / "config.json")
    if fields.get("quantization_config"):
        raise UserError(f"{base} is packed; give the full-precision pipeline as base")
    config, path = config_from_json(fields), folder / "config.json"
    if path.is_file() and config_from_json(read_json(path)) != config:
        raise UserError(
            f"{path} and base's transformer/config.json describe different models; give the base "
            "that the checkpoint was trained from"
        )
    return fields, config


@dataclass(frozen=True)
class _Importer:
    """Reads the checkpoint linear by linear and packs it.

    Attributes:
        float32: parts of the names of the layers that the release computes in float32.
        moment: the step and schedule that the branch is rebuilt for; None leaves it away.
        shares: filled on the way: of each linear its weights, and how many were clipped and how
            many have a code in the upper half.
    """

    tensors: Tensors
    plan: ReleasedPlan
    quant: QuantConfig
    float32: tuple[str, ...]
    moment: tuple[int, RankDecay] | None
    adapter_scale: float
    shares: list[tuple[int, int, int]] = field(default_factory=list)

    def specs(self) -> dict[str, Spec]:
        """Every tensor of the packed transformer."""
        infos, kept = self.tensors.infos, self.plan.kept
        specs = {name: Spec(_FLOAT32, infos[name].shape) for name in self.plan.others}
        for name, source in kept.items():
            # Matrices in full precision keep their type; all else is float32, as in our exports.
            shape = infos[source].shape
            specs[name] = Spec(infos[source].dtype if len(shape) == 2 else _FLOAT32, shape)
        for linear in self._linears():
            for leaf, shape in self._packed_shapes(linear).items():
                dtype = np.dtype(np.uint8) if leaf == "codes" else _FLOAT32
                specs[f"{linear.stem}.{leaf}"] = Spec(dtype, shape)
        return specs

    def arrays(self, specs: dict[str, Spec]) -> Iterator[tuple[str, np.ndarray]]:
        """The tensors of `specs`, each made when it is asked for."""
        copied = {name: name for name in self.plan.others} | self.plan.kept
        for name, source in copied.items():
            yield name, self.tensors[source].astype(specs[name].dtype)
        for linear in self._linears():
            for leaf, array in self._pack(linear).items():
                yield f"{linear.stem}.{leaf}", array

    def _linears(self) -> Iterator[Linear]:
        for linears in self.plan.quantized.values():
            yield from linears

    def _packed_shapes(self, linear: Linear) -> dict[str, tuple[int, ...]]:
        fan_out, fan_in, rank = linear.fan_out, linear.fan_in, self.quant.rank
        shapes = {
            "codes": (fan_out, packed_bytes(fan_in, self.quant.weight_bits)),
            "scale": (fan_out,),
            "zero_point": (fan_out,),
            "clips": (self.plan.buckets, 2),
        }
        if linear.bias:
            shapes["bias"] = (fan_out,)
        if rank:
            shapes |= {"L": (fan_out, rank), "R": (rank, fan_in), "gate": (rank,)}
        return shapes

    def _pack(self, linear: Linear) -> dict[str, np.ndarray]:
        def read(leaf: str) -> np.ndarray:
            return self.tensors[f"{linear.stem}.{leaf}"]

        weight, bits = read("w"), self.quant.weight_bits
        # A pipeline in bfloat16 keeps some layers in float32, whatever the file holds.
        exact = set(linear.stem.split(".")) & set(self.float32)
        dtype = _FLOAT32 if exact else weight.dtype
        if self.plan.adapter_rank:
            sides = read("loraA.weight"), read("loraB.weight")
            weight = arithmetic.merge_adapter(weight, *sides, self.adapter_scale, dtype)
        codes, scale, zero_point, clipped = arithmetic.quantize(
            weight, read(SCALE), read("wquantizer.zero_point"), bits, dtype
        )
        self.shares.append((codes.size, clipped, int(np.count_nonzero(codes >> (bits - 1)))))
        layer = {
            "scale": scale,
            "zero_point": zero_point,
            "lower": read("aquantizer.lower"),
            "upper": read("aquantizer.upper"),
            "bias": read("b") if linear.bias else None,
        }
        packed = pack_tensors(codes, layer, bits)
        if self.moment is not None:
            branch = read("wquantizer.L"), read("wquantizer.R")
            packed |= arithmetic.branch_at(*branch, *self.moment)
        return packed

    def check_bits(self) -> None:
        """See that the codes look like trained ones of this many bits.

        Raises:
            UserError: they look like more bits, or like fewer.
        """
        weights, clipped, upper = np.sum(self.shares, axis=0)
        bits = self.quant.weight_bits
        if clipped > _MOST_CLIPPED * weights or upper < _LEAST_UPPER * weights:
            looks = "more" if clipped > _MOST_CLIPPED * weights else "fewer"
            raise UserError(
                f"bits={bits} for weights: {clipped / weights:.0%} of them are clipped and "
                f"{upper / weights:.0%} have a code in the upper half: the checkpoint looks like "
                f"one of {looks} bits; give the bits it was trained with"
            )
