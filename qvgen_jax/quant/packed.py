"""The packed format on disk, versions 1 to 3. This module alone knows it.

Each quantized linear, under its PyTorch name:

    codes       uint8 [out, bytes]    unsigned codes 0 .. 2^bits - 1, see `quant.code_planes`
    scale       float32 [out]         weight = scale * (code - zero_point)
    zero_point  float32 [out]         a real number
    clips       float32 [buckets, 2]  (lower, upper), the raw learned parameters: a token's minimum
                                      is multiplied by sigmoid(lower) * clip_ratio, its maximum by
                                      sigmoid(upper) * clip_ratio
    bias        float32 [out]         where the layer has one

Version 2 adds a low-rank branch of one rank to every quantized linear, for checkpoints taken before
it was gone: weight + (L * gate) @ R. A folder without one is written as version 1.

    L           float32 [out, rank]
    R           float32 [rank, in]
    gate        float32 [rank]        1 for what stays, less for what was leaving

Version 3 is written where a model uses something that older readers do not know:

    symmetric_weights   no zero_point: it is 2^(bits - 1), the middle of the codes
    time_table          the linears that see only the timestep are not there. Those of them that
                        others read have one tensor, float16 or float32:
        table           [entries, out]   what the linear says, its bias included, at
        timesteps       float32 [entries], once for the whole model, sorted
    rotation            the tokens are rotated before they are quantized, see docs/format.md
    smoothing           they are divided before that by
        smooth          float32 [in]   unless the linear is `folded`
    bits_by_layer       with names of single blocks: `blocks.7.attn1.to_q`
    act_range           `learned` or `learned_zero`: no clips; all tokens of a bucket share a step
                        and a zero point (a real number, or the middle of the codes if `learned`):
                        code = clamp(round(x / act_scale + act_zero_point), 0, 2^bits - 1)
        act_scale       float32 [buckets]
        act_zero_point  float32 [buckets], with `learned_zero`
    branch_input        "tokens": the branch of that rank reads the tokens as they are before they
                        are quantized, smoothed and rotated; L and R are bfloat16, without a gate

The transformer's config.json holds a `quantization_config`, see `quantization_config`. Its layer
names are the model's `quantizable` names: `blocks.attn1.to_q` stands for every block's, but for
those that have bits of their own.
"""

from collections.abc import Mapping
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from kernels.layouts import lay_out
from qvgen_jax.config_fields import Positive, Range, check_value
from qvgen_jax.errors import UserError
from qvgen_jax.quant.code_planes import pack_codes, unpack_codes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.rotation import LARGEST_BLOCK
from qvgen_jax.quant.weights import quantize_weight

PLAIN_VERSION, BRANCH_VERSION, FEATURES_VERSION = 1, 2, 3
LEAVES = ("codes", "scale", "zero_point", "clips", "bias")
BRANCH_LEAVES = ("L", "R", "gate")
STEP_LEAVES = ("act_scale", "act_zero_point")
# Of a linear's tensors, those whose names are its params' too.
_SAME = ("zero_point", "bias", "smooth", *STEP_LEAVES)

# What QuantConfig does not check itself.
_KINDS = {"clip_ratio": Positive, "clip_buckets": int, "include_zero": bool}
_RANK = Annotated[int, Range(least=0)]  # Not in every file.

# All that a `quantization_config` may hold; `released` is of an import, and no reader needs it.
_PLAIN = ("bits", "bits_by_layer", "clip_index", "single_clip", "full_precision", "range_dtype")
_FEATURES = ("symmetric_weights", "act_range", "time_table", "rotation", "smoothing", "folded")
_KNOWN = {"quant_method", "format_version", "rank", "branch_input", "released"}
_KNOWN |= {*_KINDS, *_PLAIN, *_FEATURES}


@partial(jax.jit, static_argnames="bits")
def _signed_codes(kernel, scale, zero_point, bits):
    return quantize_weight(kernel, scale, zero_point, jnp.float32(2**bits - 1))


def pack_layer(layer: Mapping[str, Any], bits: int) -> dict[str, np.ndarray]:
    """The tensors of one trained linear.

    Args:
        layer: params of one `QuantDense`, not stacked, with its `smooth` where it has one; L and R
            are not read: an adapter must be merged by now.
        bits: of the weight.

    Returns:
        `LEAVES` by name, without `bias` if the layer has none.
    """
    signed = _signed_codes(layer["kernel"], layer["scale"], layer.get("zero_point"), bits)
    return pack_tensors(np.asarray(signed, np.int16).T + 2 ** (bits - 1), layer, bits)


def pack_tensors(
    codes: np.ndarray,
    layer: Mapping[str, Any],
    bits: int,
    branch: tuple[Any, Any] | None = None,
) -> dict[str, np.ndarray]:
    """The tensors of one linear whose codes are known.

    Args:
        codes: unsigned, `[out, in]`.
        layer: `scale`, and `lower` and `upper` or the steps; `zero_point`, `bias` and `smooth`
            where there are any.
        bits: of the codes.
        branch: `L [out, rank]` and `R [rank, in]` of one that reads tokens.
    """
    tensors = {
        "codes": pack_codes(codes, bits),
        "scale": np.asarray(layer["scale"], np.float32),
    }
    if "act_scale" not in layer:
        clips = [np.asarray(layer[k], np.float32) for k in ("lower", "upper")]
        tensors["clips"] = np.stack(clips, axis=1)
    for leaf in _SAME:
        if layer.get(leaf) is not None:
            tensors[leaf] = np.asarray(layer[leaf], np.float32)
    if branch is not None:
        kept = (np.asarray(side).astype(ml_dtypes.bfloat16) for side in branch)
        tensors |= dict(zip(("L", "R"), kept, strict=True))
    return tensors


def unpack_layer(
    tensors: Mapping[str, np.ndarray],
    bits: int,
    in_features: int,
    layout: str = "rows",
    held: int | None = None,
) -> dict[str, np.ndarray]:
    """Params of one `PackedDense` from the tensors of one linear; the inverse of `pack_layer`.

    Args:
        bits: of the codes.
        layout: of the codes, see `kernels.layouts`; the layer's own.
        held: bits that their container is chosen for, the widest of a stack; as `bits` if None.
    """
    codes = unpack_codes(tensors["codes"], bits, in_features)
    codes = (codes - np.uint8(2 ** (bits - 1))).view(np.int8).T  # Wraps into two's complement.
    layer = {
        "codes": np.ascontiguousarray(lay_out(codes, held or bits, layout)),
        "scale": np.asarray(tensors["scale"], np.float32),
        "code_sum": codes.sum(axis=0, dtype=np.int32).astype(np.float32),
    }
    if "clips" in tensors:
        for side, leaf in enumerate(("lower", "upper")):
            layer[leaf] = np.asarray(tensors["clips"][:, side], np.float32)
    for leaf in (*_SAME, *BRANCH_LEAVES):
        if leaf in tensors:
            branch = leaf in ("L", "R") and tensors[leaf].dtype == ml_dtypes.bfloat16
            layer[leaf] = np.asarray(tensors[leaf], None if branch else np.float32)
    return layer


def leaves_of(config: QuantConfig, name: str) -> tuple[str, ...]:
    """What a quantized linear of a folder holds."""
    branch = BRANCH_LEAVES if config.branch_input == "codes" else BRANCH_LEAVES[:2]
    leaves = LEAVES + branch if config.rank else LEAVES
    absent = {"zero_point": config.symmetric_weights, "clips": config.learned_steps}
    leaves = tuple(leaf for leaf in leaves if not absent.get(leaf))
    if config.learned_steps:
        leaves += STEP_LEAVES[: 2 if config.act_range == "learned_zero" else 1]
    return (*leaves, "smooth") if config.smooths(name) else leaves


def quantization_config(config: QuantConfig) -> dict[str, Any]:
    """The JSON object that describes packed tensors; `config.rank` is that of their branch."""
    features: dict[str, Any] = {}
    if config.symmetric_weights:
        features["symmetric_weights"] = True
    if config.learned_steps:
        features["act_range"] = config.act_range
    if config.time_table:
        table = {"entries": config.time_entries, "steps": list(config.table_steps)}
        features["time_table"] = table
    if config.rotation != "none":
        features["rotation"] = {"kind": config.rotation, "largest_block": LARGEST_BLOCK}
    if config.smoothing:
        features["smoothing"] = config.smoothing
    if config.rank and config.branch_input != "codes":
        features["branch_input"] = config.branch_input
    if config.folded:
        features["folded"] = {
            name: {"into": source, "head_width": width}
            for name, (source, width) in sorted(config.folded.items())
        }
    version = BRANCH_VERSION if config.rank else PLAIN_VERSION
    fields = {
        "quant_method": "qvgen",
        "format_version": FEATURES_VERSION if features or config.by_block else version,
        "bits": {"weights": config.weight_bits, "activations": config.act_bits},
        "bits_by_layer": {
            name: {"weights": weights, "activations": activations}
            for name, (weights, activations) in sorted(config.bits.items())
        },
        "clip_index": config.clip_index,
        "clip_buckets": config.buckets,
        "clip_ratio": config.clip_ratio,
        "single_clip": list(config.single_clip),
        "full_precision": list(config.full_precision),
        "include_zero": config.include_zero,
        "range_dtype": config.range_dtype,
    }
    return fields | features | ({"rank": config.rank} if config.rank else {})


def read_quantization_config(fields: Mapping[str, Any]) -> QuantConfig:
    """The config that packed tensors were written with, with int8 products.

    Raises:
        UserError: another method or version, or a field that is unknown, missing or out of range.
    """
    if not isinstance(fields, Mapping):
        raise UserError(
            f"quantization_config is {fields!r}, expected an object with the fields of "
            "docs/format.md; export again"
        )
    method, version = fields.get("quant_method"), fields.get("format_version")
    if method != "qvgen":
        raise UserError(
            f"quantization_config has quant_method={method!r}; only exports of this project "
            "('qvgen') can be read: give a full-precision folder or one written by --job export"
        )
    if version not in (PLAIN_VERSION, BRANCH_VERSION, FEATURES_VERSION):
        raise UserError(
            f"quantization_config has format_version={version!r}, this program reads "
            f"{PLAIN_VERSION} to {FEATURES_VERSION}; export again, or install the version that "
            "wrote the folder"
        )
    if unknown := sorted(set(fields) - _KNOWN):
        raise UserError(
            f"quantization_config has {', '.join(unknown)}, which this program does not know; "
            "install the version that wrote the folder"
        )
    try:
        for name, kind in _KINDS.items():
            check_value(fields[name], kind, name, "quantization_config")
        if "rank" in fields:
            check_value(fields["rank"], _RANK, "rank", "quantization_config")
        ratio = float(fields["clip_ratio"])
        config = QuantConfig(
            weight_bits=fields["bits"]["weights"],
            act_bits=fields["bits"]["activations"],
            bits={
                name: (pair["weights"], pair["activations"])
                for name, pair in fields["bits_by_layer"].items()
            },
            rank=fields["rank"] if version == BRANCH_VERSION else fields.get("rank", 0),
            symmetric_weights=bool(fields.get("symmetric_weights", False)),
            act_range=fields.get("act_range", "token"),
            rotation=_rotation(fields.get("rotation")),
            smoothing=fields.get("smoothing", 0.0),
            branch_input=fields.get("branch_input", "codes"),
            folded={
                name: (source["into"], source["head_width"])
                for name, source in fields.get("folded", {}).items()
            },
            buckets=fields["clip_buckets"],
            clip_index=fields["clip_index"],
            single_clip=tuple(fields["single_clip"]),
            full_precision=tuple(fields["full_precision"]),
            include_zero=fields["include_zero"],
            range_dtype=fields["range_dtype"],
            **_time_table(fields.get("time_table")),
            **({"initial_clip": ratio, "clip_twice": True} if ratio != 1.0 else {}),
        )
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"quantization_config is damaged ({type(error).__name__}: {error}); export again"
        ) from error
    if config.by_block and version != FEATURES_VERSION:
        raise UserError(
            f"quantization_config gives bits to single blocks and has format_version={version}, "
            f"which does not know them, expected {FEATURES_VERSION}; export again"
        )
    return config


def _time_table(table: Mapping[str, Any] | None) -> dict[str, Any]:
    if table is None:
        return {}
    steps, entries = tuple(table["steps"]), table["entries"]
    if not all(isinstance(number, int) and number > 0 for number in (*steps, entries)):
        raise TypeError(f"time_table is {dict(table)}")
    return {"time_table": True, "table_steps": steps, "time_entries": entries}


def _rotation(rotation: Mapping[str, Any] | None) -> str:
    if rotation is None:
        return "none"
    if rotation["largest_block"] != LARGEST_BLOCK:
        raise UserError(
            f"quantization_config says that tokens are rotated in blocks of up to "
            f"{rotation['largest_block']}, this program does up to {LARGEST_BLOCK}; install the "
            "version that wrote the folder"
        )
    return rotation["kind"]
