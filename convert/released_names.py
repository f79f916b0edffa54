"""The names in a checkpoint of QVGen's release, and a plan that accounts for every one of them.

A quantized linear X of diffusers' model holds

    X.w                      [out, in]
    X.b                      [out]
    X.wquantizer.scale       [out, 1]
    X.wquantizer.zero_point  [out, 1]
    X.aquantizer.upper       [buckets]
    X.aquantizer.lower       [buckets]
    X.wquantizer.L           [out, rank]   if saved before the last phase,
    X.wquantizer.R           [rank, in]    of the rank that training began with
    X.loraA.weight           [r, in]       if trained as an adapter
    X.loraB.weight           [out, r]

and any other linear X.weight and X.bias, as everything that is no linear keeps diffusers' name.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from convert.names import Entry, in_ranges, torch_names, torch_shape
from convert.packed import linear_stems, split_table
from convert.plan import leaf_shapes
from convert.safetensors_file import TensorInfo
from convert.tables import table_for
from qvgen_jax.errors import UserError
from qvgen_jax.models import TransformerConfig, quantizable
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.config import QuantConfig

SCALE = "wquantizer.scale"
_FLOATS = ("F32", "BF16", "F16")


class Recipe(NamedTuple):
    """What the release's files leave unsaid about one family.

    Attributes:
        phase_steps: of the published training recipe.
        float32: parts of names that diffusers keeps in float32 in a pipeline of any type.
    """

    phase_steps: int
    float32: tuple[str, ...]


_RECIPES = {WanConfig: Recipe(444, ("time_embedder",)), CogVideoXConfig: Recipe(333, ())}


def recipe_of(config: TransformerConfig) -> Recipe:
    """The recipe of a transformer's family."""
    return _RECIPES[type(config)]


class Linear(NamedTuple):
    """One quantizable linear by its PyTorch name."""

    stem: str
    fan_out: int
    fan_in: int
    bias: bool


class ReleasedPlan(NamedTuple):
    """Every tensor of a released checkpoint, paired with what becomes of it.

    Attributes:
        quantized: our name of each quantized linear, and the linears of its blocks.
        full_precision: our names of the linears that are not quantized.
        kept: of their tensors, diffusers' name to the checkpoint's.
        others: the names of all that is no linear.
        buckets: clip pairs per linear.
        rank: of the low-rank branch; 0 where there is none.
        adapter_rank: r of the adapters; 0 where there are none.
    """

    quantized: dict[str, list[Linear]]
    full_precision: tuple[str, ...]
    kept: dict[str, str]
    others: tuple[str, ...]
    buckets: int
    rank: int
    adapter_rank: int


def is_released(names: Iterable[str]) -> bool:
    """Whether the tensors' names are those of a released QVGen checkpoint."""
    return any(name.endswith(f".{SCALE}") for name in names)


def linears_of(config: TransformerConfig) -> dict[str, list[Linear]]:
    """Every quantizable linear of the model: our name, and one `Linear` per block."""
    table, shapes = table_for(config), leaf_shapes(config)
    kernels, _ = split_table(table, quantizable(config))
    with_bias = {entry.path[:-1] for entry in table if entry.path[-1] == "bias"}
    linears = {}
    for name, entry in kernels.items():
        fan_in, fan_out = shapes[entry.path][-2:]
        bias = entry.path[:-1] in with_bias
        linears[name] = [Linear(stem, fan_out, fan_in, bias) for stem in linear_stems(entry)]
    return linears


def other_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name and PyTorch shape of everything that is no quantizable linear."""
    shapes = leaf_shapes(config)
    _, rest = split_table(table_for(config), quantizable(config))
    return {name: _shape(entry, shapes) for entry in rest for name in torch_names([entry])}


def _shape(entry: Entry, shapes: Mapping) -> tuple[int, ...]:
    shape = shapes[entry.path]
    return torch_shape(shape if entry.layers is None else shape[1:], entry)


def quantized_shapes(linear: Linear, buckets: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one quantized linear after its last phase: leaf to shape."""
    shapes = {
        "w": (linear.fan_out, linear.fan_in),
        SCALE: (linear.fan_out, 1),
        "wquantizer.zero_point": (linear.fan_out, 1),
        "aquantizer.upper": (buckets,),
        "aquantizer.lower": (buckets,),
    }
    return shapes | ({"b": (linear.fan_out,)} if linear.bias else {})


def _all_shapes(
    linear: Linear, buckets: int, rank: int, adapter_rank: int
) -> dict[str, tuple[int, ...]]:
    shapes = quantized_shapes(linear, buckets)
    if rank:
        shapes["wquantizer.L"] = (linear.fan_out, rank)
        shapes["wquantizer.R"] = (rank, linear.fan_in)
    if adapter_rank:
        shapes["loraA.weight"] = (adapter_rank, linear.fan_in)
        shapes["loraB.weight"] = (linear.fan_out, adapter_rank)
    return shapes


def _size(infos: Mapping[str, TensorInfo], leaf: str, axis: int) -> int:
    """The size that the first tensor of this kind has; all others must agree."""
    found = (info.shape for name, info in infos.items() if name.endswith(f".{leaf}"))
    shape = next(found, ())
    return shape[axis] if len(shape) > axis else 0


def _is_quantized(linear: Linear, infos: Mapping[str, TensorInfo]) -> bool:
    leaves = (leaf for leaf in quantized_shapes(linear, 0) if "quantizer" in leaf)
    return any(f"{linear.stem}.{leaf}" in infos for leaf in leaves)


def plan_released(config: TransformerConfig, infos: Mapping[str, TensorInfo]) -> ReleasedPlan:
    """Pairs every tensor of a released checkpoint with its use, from the headers alone.

    Args:
        config: of the full-precision transformer.
        infos: from the checkpoint's headers.

    Raises:
        UserError: tensors are missing, unexpected, of a wrong shape or type, or a linear is
            quantized in some blocks only. Every culprit is named.
    """
    buckets = _size(infos, "aquantizer.upper", 0) or QuantConfig.buckets
    rank = _size(infos, "wquantizer.L", 1)
    adapter_rank = _size(infos, "loraA.weight", 0)
    expected = other_shapes(config)
    others = tuple(expected)
    quantized, full_precision, kept, split = {}, [], {}, []
    for name, linears in linears_of(config).items():
        marks = [_is_quantized(linear, infos) for linear in linears]
        split += [x.stem for x, mark in zip(linears, marks, strict=True) if mark != max(marks)]
        if any(marks):
            quantized[name] = linears
        else:
            full_precision.append(name)
        for linear, mark in zip(linears, marks, strict=True):
            if mark:
                leaves = _all_shapes(linear, buckets, rank, adapter_rank)
                expected |= {f"{linear.stem}.{leaf}": shape for leaf, shape in leaves.items()}
            else:
                sources = _full_precision_names(linear, infos)
                expected |= {source: shape for _, source, shape in sources}
                kept |= {target: source for target, source, _ in sources}
    _check(expected, infos, split)
    full_precision = tuple(full_precision)
    return ReleasedPlan(quantized, full_precision, kept, others, buckets, rank, adapter_rank)


def _full_precision_names(linear: Linear, infos: Mapping) -> list[tuple[str, str, tuple]]:
    """(diffusers' name, the checkpoint's, shape) of a linear that was left as it is."""
    theirs = ("w", "b") if f"{linear.stem}.w" in infos else ("weight", "bias")
    shapes = ((linear.fan_out, linear.fan_in), (linear.fan_out,))[: 1 + linear.bias]
    stem = linear.stem
    return [
        (f"{stem}.{ours}", f"{stem}.{leaf}", shape)
        for ours, leaf, shape in zip(("weight", "bias"), theirs, shapes, strict=False)
    ]


def _check(
    expected: Mapping[str, tuple[int, ...]], infos: Mapping[str, TensorInfo], split: list[str]
) -> None:
    faults = []
    if missing := set(expected) - set(infos):
        faults.append(f"{len(missing)} tensors missing [{in_ranges(missing)}]")
    if unexpected := set(infos) - set(expected):
        faults.append(f"{len(unexpected)} unexpected [{in_ranges(unexpected)}]")
    wrong: dict[str, list[str]] = {}
    for name in set(expected) & set(infos):
        info, shape = infos[name], expected[name]
        if info.shape != shape:
            wrong.setdefault(f"is {list(info.shape)}, expected {list(shape)}", []).append(name)
        elif info.kind not in _FLOATS:
            wrong.setdefault(f"is {info.kind}, expected {', '.join(_FLOATS)}", []).append(name)
    faults += [f"{in_ranges(names)} {fault}" for fault, names in sorted(wrong.items())]
    if split:
        faults.append(
            f"[{in_ranges(f'{stem}.w' for stem in split)}] not quantized, but the same linear of "
            "other blocks: a linear is quantized in all blocks or in none"
        )
    if faults:
        raise UserError(
            f"the released checkpoint does not fit the base model: {'; '.join(faults)}; check that "
            "base is the model it was trained from and that the file is whole"
        )
