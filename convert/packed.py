"""A packed transformer between our params and diffusers' tensor names."""

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from convert.names import Entry, check_names, from_torch, to_torch, torch_names, torch_shape
from convert.tables import table_for
from kernels.chips import Chip
from qvgen_jax.errors import UserError
from qvgen_jax.models import (
    TransformerConfig,
    build_transformer,
    quantizable,
    time_only,
    time_outputs,
)
from qvgen_jax.quant.blocks import (
    Place,
    Segment,
    is_stacked,
    levels_of,
    places_of,
    segment_key,
    segments_of,
)
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.packed import leaves_of, pack_layer, unpack_layer
from qvgen_jax.quant.time_table import stored_table, table_factory


def split_table(
    table: list[Entry], quantized: tuple[str, ...]
) -> tuple[dict[str, Entry], list[Entry]]:
    """Kernel entries of the quantized linears by name, and the entries of everything else."""
    kernels, rest = {}, []
    for entry in table:
        name = ".".join(entry.path[:-1])
        if name not in quantized:
            rest.append(entry)
        elif entry.path[-1] == "kernel":
            kernels[name] = entry
    return kernels, rest


def linear_stems(entry: Entry) -> list[str]:
    stem = entry.name.removesuffix(".weight")
    return [stem] if entry.layers is None else [stem.format(i=i) for i in range(entry.layers)]


def layer_names(model: TransformerConfig, quant: QuantConfig) -> dict[str, list[str]]:
    """Of every quantized linear of the parameters, the names in an export that its stack has.

    `blocks.ffn.up` of a Wan is `blocks.0.ffn.net.0.proj`, `blocks.1.ffn.net.0.proj` and so on.
    """
    kernels, _ = split_table(table_for(model), quant.quantized(quantizable(model)))
    return {name: linear_stems(entry) for name, entry in kernels.items()}


def _layers(node: Mapping, stacked: bool) -> list[dict]:
    if not stacked:
        return [dict(node)]
    return [{k: leaf[i] for k, leaf in node.items()} for i in range(len(node["kernel"]))]


def to_packed(
    table: list[Entry],
    params: Mapping,
    names: tuple[str, ...],
    quant: QuantConfig,
    levels: Mapping | None = None,
) -> dict[str, np.ndarray]:
    """Tensors by PyTorch name of a trained student; `levels` hold the factors of smoothing.

    Linears that stay in full precision are bfloat16. The rest (patch embedding, norms, modulation
    tables, biases) is float32: 0.2 % of a packed 14B model, and the export computes what was
    trained.
    """
    kernels, _ = split_table(table, quant.quantized(names))
    tensors = unquantized(table, params, names, quant)
    for name, entry in kernels.items():
        node = dict(layer_at(params, name))
        if quant.smooths(name):
            node["smooth"] = layer_at(levels, name)["smooth"]
        layers = _layers(node, entry.layers is not None)
        packed = [
            pack_layer(layer, _bits(quant, name, block)[0]) for block, layer in enumerate(layers)
        ]
        tensors |= named_tensors(entry, packed)
    return tensors


def named_tensors(entry: Entry, layers: list[dict]) -> dict[str, np.ndarray]:
    """The packed tensors of one linear, or of one in every layer, by their PyTorch names.

    Args:
        entry: of its kernel.
        layers: each one's tensors by leaf.
    """
    pairs = zip(linear_stems(entry), layers, strict=True)
    return {f"{stem}.{leaf}": array for stem, layer in pairs for leaf, array in layer.items()}


def unquantized(
    table: list[Entry], params: Mapping, names: tuple[str, ...], quant: QuantConfig
) -> dict[str, np.ndarray]:
    """The tensors of all but the quantized linears, as `to_packed` has them."""
    _, rest = split_table(table, quant.quantized(names))
    tensors = to_torch(rest, params)
    kept = {entry.name for entry in rest if ".".join(entry.path[:-1]) in quant.full_precision}
    for entry in rest:
        for name in torch_names([entry]):
            if entry.path[-1] == "table":
                tensors[name] = stored_table(tensors[name])
                continue
            matrix = entry.name in kept and entry.path[-1] == "kernel"
            tensors[name] = tensors[name].astype(ml_dtypes.bfloat16 if matrix else np.float32)
    return tensors


def _bits(quant: QuantConfig, name: str, block: int) -> tuple[int, int]:
    return quant.bits_of(name, block if is_stacked(name) else None)


class PackedDefinition(NamedTuple):
    """A packed network described.

    Where blocks lie differently its stacks are several, each with a path of its own: see
    `qvgen_jax.quant.blocks.places_of`.

    Attributes:
        graphdef: of the transformer.
        shapes: of its params, nested dict.
        levels: what of it is not trained, nested dict of arrays.
        layouts: of the codes of every quantized linear, by path (`kernels.layouts`).
        inputs: how many channels every quantized linear reads, by path.
        segments: of its blocks.
    """

    graphdef: nnx.GraphDef
    shapes: dict
    levels: dict
    layouts: dict[str, str]
    inputs: dict[str, int]
    segments: tuple[Segment, ...]


def packed_definition(
    config: TransformerConfig,
    quant: QuantConfig,
    dtype: jnp.dtype,
    backend: str = "auto",
    chip: Chip | None = None,
) -> PackedDefinition:
    """The network that an export loads into.

    Args:
        dtype: in which it computes.
        backend: of its products, see `kernels.choose`.
        chip: that it will run on; this machine's if None.

    Raises:
        UserError: the config names layers or blocks that the model does not have.
    """
    names = quant.quantized(quantizable(config))
    quant.check_blocks(config.num_layers)
    segments = segments_of(quant, names, config.num_layers)

    def factory(own: QuantConfig) -> Callable[..., nnx.Module]:
        dense = dense_factory(own, "packed", backend=backend, chip=chip)
        if not quant.time_table:
            return dense
        return table_factory(dense, quant.time_entries, time_only(config), time_outputs(config))

    model = nnx.eval_shape(
        lambda: build_transformer(
            config,
            key=jax.random.key(0),
            dense=factory(quant),
            dtype=dtype,
            clip_mode=quant.clip_index,
            buckets=quant.buckets,
            remat="none",
            time_entries=quant.time_entries,
            segments=[(each.stop - each.start, factory(each.config)) for each in segments],
        )
    )
    graphdef, shapes, levels = nnx.split(model, nnx.Param, Levels)
    shapes, levels = nnx.to_pure_dict(shapes), nnx.to_pure_dict(levels)
    layouts, inputs = {}, {}
    for name in names:
        for place in places_of(name, segments):
            layer = reduce(getattr, place.path.split("."), model)
            layouts[place.path], inputs[place.path] = layer.layout, layer.in_features
            node = layer_at(levels, place.path)
            most = map(np.asarray, levels_of(quant, name, place.blocks))
            node["weight_levels"], node["act_levels"] = most
    return PackedDefinition(graphdef, shapes, levels, layouts, inputs, segments)


def from_packed(
    table: list[Entry],
    tensors: Mapping[str, np.ndarray],
    names: tuple[str, ...],
    quant: QuantConfig,
    definition: PackedDefinition,
    put: Callable[[np.ndarray, str, str], Any] = lambda array, name, leaf: array,
) -> dict:
    """Params of the packed network; the inverse of `to_packed`.

    Nothing is ever held in full precision: the codes of one layer at a time are unpacked, into the
    layout that its backend wants.

    Args:
        table: of the full-precision model.
        tensors: by PyTorch name.
        names: the model's quantizable linears.
        quant: as read from the folder.
        definition: of the expected network.
        put: what becomes of each finished array of a quantized linear, of its name and leaf.

    Raises:
        UserError: tensors are missing, unexpected or of another shape.
    """
    kernels, rest = split_table(table, quant.quantized(names))
    packed_names = {
        f"{stem}.{leaf}"
        for name, entry in kernels.items()
        for stem in linear_stems(entry)
        for leaf in leaves_of(quant, name)
    }
    missing = sorted(packed_names - set(tensors))
    if missing:
        raise UserError(
            f"{len(missing)} tensors of packed linears are missing {missing[:4]}; the export is "
            "incomplete or of another model, export again"
        )
    others = {n: tensors[n] for n in tensors if n not in packed_names}
    check_names(torch_names(rest), others)
    for entry in rest:
        place = places_of(".".join(entry.path), definition.segments)[0]
        leaf = layer_at(definition.shapes, place.path)
        expected = torch_shape(_layer_shape(leaf, entry), entry)
        for name in torch_names([entry]):
            _check_shape(name, others[name], expected)
    params = _in_segments(from_torch(rest, others), definition.segments)
    for name, entry in kernels.items():
        stems, leaves = linear_stems(entry), leaves_of(quant, name)
        for place in places_of(name, definition.segments):
            layers = (
                (
                    stems[block],
                    _bits(quant, name, block)[0],
                    {leaf: tensors[f"{stems[block]}.{leaf}"] for leaf in leaves},
                )
                for block in place.blocks or [0]
            )
            node = _unpacked(layers, definition, place)
            node = {key: put(array, place.path, key) for key, array in node.items()}
            params = with_layer(params, place.path, node)
    return params


def _unpacked(
    layers: Iterable[tuple[str, int, dict[str, np.ndarray]]],
    definition: PackedDefinition,
    place: Place,
) -> dict[str, np.ndarray]:
    """Params of a stack, or of a linear outside the blocks, from each one's stem, bits and tensors.

    One layer at a time.
    """
    expected, layout = layer_at(definition.shapes, place.path), definition.layouts[place.path]
    stacked, node = place.blocks is not None, {}
    for index, (stem, bits, layer) in enumerate(layers):
        layer = unpack_layer(layer, bits, definition.inputs[place.path], layout, place.bits[0])
        for key, array in layer.items():
            shape = expected[key].shape
            _check_shape(f"{stem}.{key}", array, shape[1:] if stacked else shape)
            if key not in node:
                node[key] = np.empty(shape, array.dtype)
            node[key][index if stacked else ...] = array
    return node


def _in_segments(params: dict, segments: tuple[Segment, ...]) -> dict:
    """The params with the stacks of the blocks cut into those of the segments."""
    if len(segments) == 1 or "blocks" not in params:
        return params
    cut = {
        segment_key(each.start): jax.tree.map(
            lambda stack, each=each: stack[each.start : each.stop], params["blocks"]
        )
        for each in segments
    }
    return {**params, "blocks": cut}


def _layer_shape(leaf: jax.ShapeDtypeStruct, entry: Entry) -> tuple[int, ...]:
    return leaf.shape if entry.layers is None else leaf.shape[1:]


def _check_shape(name: str, array: np.ndarray, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        raise UserError(
            f"{name} is {list(array.shape)}, expected {list(expected)} by config.json; the "
            "export is of another model, export again"
        )
