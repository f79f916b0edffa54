"""A pipeline folder in diffusers' layout to the parts of a `qvgen_jax.pipeline.Pipeline`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from convert import array_tree, t5
from convert.names import Entry, from_torch
from convert.packed import from_packed, packed_definition
from convert.tables import table_for
from convert.tensors import PICKLES, Tensors, pickle_refusal, read_json
from convert.time_table import fold_names
from qvgen_jax import storage
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig
from qvgen_jax.components import VAE, TextEncoder
from qvgen_jax.diffusion.schedulers import scheduler_from_json
from qvgen_jax.errors import UserError
from qvgen_jax.generation_config import generation_defaults
from qvgen_jax.models import TransformerConfig, build_transformer, config_from_json, quantizable
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.placement import Shardings, with_shardings
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import layer_at
from qvgen_jax.quant.packed import read_quantization_config
from qvgen_jax.text.t5 import T5Config, T5Encoder
from qvgen_jax.text.tokenizer import (
    COGVIDEOX_PROMPTS,
    WAN_PROMPTS,
    default_max_length,
    load_tokenizer,
)
from qvgen_jax.transformer import Transformer

_LICENCES = ("*LICENSE*", "*LICENCE*", "*NOTICE*", "*README.md")

# Of the transformer, PyTorch's Wan keeps these in float32 whatever the rest is held in.
_FLOAT32 = ("time_embedder", "time_proj", "scale_shift_table")

_AUTOENCODERS = {
    "AutoencoderKLWan": (WanVAEConfig, WanVAE),
    "AutoencoderKLCogVideoX": (CogVideoXVAEConfig, CogVideoXVAE),
}


def read_components(
    path: str | Path,
    dtype: jnp.dtype,
    text_weights: str = "float",
    shardings: Shardings = None,
    kernels: str = "auto",
) -> dict[str, Any]:
    """Everything in the folder, as keyword arguments of `Pipeline`.

    Args:
        path: a folder, or the name of one on the Hugging Face hub.
        dtype: of the matrices of transformer and text encoder, and of what they compute.
        text_weights: "float", or "int8" for the text encoder in a byte per weight.
        shardings: of the transformer, as `read_transformer` takes them.
        kernels: of a packed transformer, likewise.

    Raises:
        UserError: see `qvgen_jax.load`.
    """
    folder = find_folder(path)
    pipeline = check_index(folder)
    tokenizer = load_tokenizer(folder / "tokenizer")
    transformer = read_transformer(folder / "transformer", dtype, shardings, kernels)
    wan = isinstance(transformer.config, WanConfig)
    if wan != (pipeline == "WanPipeline"):
        raise UserError(
            f"{folder / 'model_index.json'} says {pipeline}, but the transformer is of another "
            "family; fetch the folder again"
        )
    rule = WAN_PROMPTS if wan else COGVIDEOX_PROMPTS
    return {
        "transformer": transformer,
        "vae": read_vae(folder / "vae"),
        "text_encoder": read_text_encoder(folder / "text_encoder", dtype, text_weights),
        "tokenizer": tokenizer,
        "scheduler": scheduler_from_json(read_json(folder / "scheduler/scheduler_config.json")),
        "defaults": _read_defaults(folder, transformer.config, default_max_length(tokenizer, rule)),
        "prompt_rule": rule,
    }


def find_folder(path: str | Path) -> Path:
    """The folder itself, or the local copy of a remote one or a hub repository, made if need be.

    Raises:
        UserError: neither exists, or the bucket or the hub cannot be reached.
    """
    if storage.is_remote(path):
        return storage.local(path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if folder.suffix in PICKLES and folder.is_file():
        raise pickle_refusal(folder)
    parts = str(path).split("/")
    if len(parts) != 2 or not all(part and part[0] not in ".~" for part in parts):
        raise UserError(f"{path} is not a folder; give a pipeline folder or a hub name owner/name")
    import huggingface_hub

    kinds = ("*.json", "*.safetensors", "*.model", "*.txt", *_LICENCES)
    try:
        return Path(huggingface_hub.snapshot_download(str(path), allow_patterns=list(kinds)))
    except Exception as error:  # Its errors have no common base: network, cache, name, access.
        raise UserError(
            f"{path} is no folder here and did not come from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
            "); check the name and the connection, or download it and give the folder"
        ) from error


def check_index(folder: Path) -> str:
    """The pipeline's class, if it is of a supported kind.

    Raises:
        UserError: its `model_index.json` names another class or a second transformer.
    """
    index = read_json(folder / "model_index.json")
    name = index.get("_class_name")
    parts = {part: index.get(part) for part in ("transformer_2", "image_encoder")}
    strange = [part for part, held in parts.items() if not isinstance(held, list | None)]
    if strange:
        raise UserError(
            f"{folder / 'model_index.json'} has {strange[0]}: {parts[strange[0]]!r}, expected null "
            "or [library, class]; fetch the folder again"
        )
    second = [part for part, held in parts.items() if held and held[0] is not None]
    if index.get("expand_timesteps"):
        second.append("expand_timesteps")
    if name not in ("WanPipeline", "CogVideoXPipeline") or second:
        extra = f" with {', '.join(second)}" if second else ""
        raise UserError(
            f"{folder} holds a {name}{extra}; supported are text-to-video pipelines with one "
            "transformer: WanPipeline of Wan 2.1, CogVideoXPipeline of CogVideoX 2B, 5B and 1.5-5B"
        )
    return name


def _read_defaults(folder: Path, config: TransformerConfig, max_length: int) -> dict[str, Any]:
    path = folder / "generation_config.json"
    fields = read_json(path) if path.exists() else {}
    return generation_defaults(fields, config, max_length, str(path))


def read_default_steps(folder: Path, config: TransformerConfig) -> int:
    """How many steps a pipeline's `generate` takes where the call does not say."""
    return _read_defaults(folder, config, max_length=1)["steps"]


def read_transformer(
    folder: Path, dtype: jnp.dtype, shardings: Shardings = None, kernels: str = "auto"
) -> Transformer:
    """The transformer of a folder: full precision, imported, or packed by this project's export.

    Args:
        folder: the transformer's.
        dtype: of its matrices.
        shardings: where the parameters shall live; see `qvgen_jax.load`. Of an imported one every
            host reads its own slices only; the other two are read whole by every host. If None, the
            parameters arrive in host memory, but for a packed one's linears, which go to the
            default device one by one.
        kernels: the backend of a packed one's products, see `qvgen_jax.load`.

    Raises:
        UserError: the folder is damaged or of another model, or the shardings do not fit it.
    """
    fields = read_json(folder / "config.json")
    config = config_from_json(fields)
    if fields.get("quantization_config"):
        quant = read_quantization_config(fields["quantization_config"])
        return _read_packed_transformer(folder, config, quant, dtype, shardings, kernels)

    def build() -> nnx.Module:
        return build_transformer(config, key=jax.random.key(0), dtype=dtype, remat="none")

    def precision(path: tuple[str, ...]) -> jnp.dtype:
        return jnp.float32 if set(path) & set(_FLOAT32) else dtype

    graphdef, expected = _described(build, precision)
    like = with_shardings(expected, shardings)
    if array_tree.is_array_tree(folder):
        params = array_tree.restore_params(folder, like)
    else:
        params = _read_params(folder, table_for(config), Tensors(folder), like)
    return Transformer(config, graphdef, (params,))


def _read_packed_transformer(
    folder: Path,
    config: TransformerConfig,
    quant: QuantConfig,
    dtype: jnp.dtype,
    shardings: Shardings,
    backend: str,
) -> Transformer:
    definition = packed_definition(config, quant, dtype, backend)
    like = with_shardings(definition.shapes, shardings)
    table = fold_names(table_for(config), config) if quant.time_table else table_for(config)

    def put(array: np.ndarray, name: str, leaf: str) -> jax.Array:
        # At once, one by one: on a CPU, too, an array in a device's memory is a copy.
        return jax.device_put(array, layer_at(like, name)[leaf].sharding)

    names = quantizable(config)
    params = from_packed(table, Tensors(folder), names, quant, definition, put)
    params = jax.tree.map(_put, params, like)
    states = (params, definition.levels)
    return Transformer(config, definition.graphdef, states, table_steps=quant.table_steps)


def read_vae(folder: Path) -> VAE:
    """The VAE of a folder, in float32."""
    fields = read_json(folder / "config.json")
    name = fields.get("_class_name", "AutoencoderKLWan")
    if not isinstance(name, str) or name not in _AUTOENCODERS:
        raise UserError(
            f"{folder} holds a {name}; supported are {', '.join(_AUTOENCODERS)}, the autoencoders "
            "of Wan 2.1 and CogVideoX"
        )
    config_class, network = _AUTOENCODERS[name]
    config = config_class.from_json(fields)

    def build() -> nnx.Module:
        return network(config, key=jax.random.key(0))

    graphdef, expected = _described(build, lambda path: jnp.float32)
    params = _read_params(folder, table_for(config), Tensors(folder), expected)
    return VAE(config, graphdef, (params,))


def read_text_encoder(folder: Path, dtype: jnp.dtype, weights: str = "float") -> TextEncoder:
    """The text encoder of a folder, T5 or UMT5.

    Args:
        dtype: in which it computes, and holds its matrices if they are floats.
        weights: "float", or "int8": a byte per weight, quantized tensor by tensor while reading.

    Raises:
        UserError: another kind of weights, or a folder that is damaged or of another model.
    """
    if weights not in ("float", "int8"):
        raise UserError(f"weights is {weights!r}, expected 'float' or 'int8'")
    config = T5Config.from_json(read_json(folder / "config.json"))
    tensors = t5.Untied(Tensors(folder))

    def build() -> T5Encoder:
        return T5Encoder(config, key=jax.random.key(0), dtype=dtype, weights=weights)

    if weights == "int8":
        graphdef = nnx.graphdef(nnx.eval_shape(build))
        return TextEncoder(config, graphdef, (t5.read_int8(config, tensors),))
    graphdef, expected = _described(build, lambda path: dtype)
    params = _read_params(folder, t5.name_table(config), tensors, expected)
    return TextEncoder(config, graphdef, (params,))


def _read_params(
    folder: Path, table: list[Entry], tensors: Mapping[str, np.ndarray], expected: dict
) -> dict:
    """The tensors in our layout, each leaf in the type and the sharding of `expected`."""
    params = from_torch(table, tensors)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        names = tuple(part.key for part in path)
        node = params
        for name in names[:-1]:
            node = node[name]
        array = node[names[-1]]
        if array.shape != leaf.shape:
            raise UserError(
                f"{folder}: {'.'.join(names)} is {list(array.shape)}, expected "
                f"{list(leaf.shape)} by config.json; they belong to different models"
            )
        node[names[-1]] = _put(np.asarray(array, leaf.dtype), leaf)
    return params


def _put(array: np.ndarray, leaf: jax.ShapeDtypeStruct) -> jax.Array | np.ndarray:
    return array if leaf.sharding is None else jax.device_put(array, leaf.sharding)


def _described(
    build: Callable[[], nnx.Module], precision: Callable[[tuple[str, ...]], jnp.dtype]
) -> tuple[nnx.GraphDef, dict]:
    """The network's description, and its parameters' shapes with the types to hold them in.

    Vectors stay float32, whatever `precision` says.
    """
    graphdef, state = nnx.split(nnx.eval_shape(build), nnx.Param)

    def held(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        names = tuple(part.key for part in path)
        matrix = names[-1] in ("kernel", "token_embedding")
        return jax.ShapeDtypeStruct(leaf.shape, precision(names) if matrix else jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(held, nnx.to_pure_dict(state))
