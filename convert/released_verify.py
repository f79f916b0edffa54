"""Verify a packed import of QVGen's release: every tensor recomputed from the checkpoint."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from convert.certificate import certify, compare_files
from convert.load import find_folder
from convert.released import cards, checkpoint_folder, read_base
from convert.released_check import ReleasedCheck
from convert.released_names import is_released, plan_released, recipe_of
from convert.released_options import RECORD, ReleasedOptions, recorded
from convert.tensors import Tensors, read_json
from convert.travel import Report, companions, silent
from qvgen_jax.errors import UserError
from qvgen_jax.quant.packed import read_quantization_config

_CONFIG = Path("transformer", "config.json")


def verify_released(
    checkpoint: str | Path,
    base: str | Path,
    packed: str | Path,
    *,
    clip_index: str | None = None,
    bits: tuple[int, int] | None = None,
    released_step: int | None = None,
    phase_steps: int | None = None,
    lora_alpha: float | None = None,
    progress: Report = silent,
) -> dict[str, Any]:
    """Checks a packed pipeline against the checkpoint it was imported from; writes the certificate.

    Codes, scales, zero points, clips, biases, gates and full-precision tensors must be those that
    the release's formulas give (`released_formula`); a refactored L and R must be the SVD form of
    the checkpoint's product; every other file must be the base's, or the checkpoint's licence or
    card. At any time one layer is in memory.

    Args:
        checkpoint: as `import_released` took it, like `base` and the options after `packed`.
        base: the full-precision pipeline.
        packed: the folder that the import made. Options that are not given are what it records.
        progress: told after every tensor.

    Returns:
        The certificate, as `verify`'s and with, for codes, how many differ, and the largest
        difference between `scale * (code - zero_point)` of the packed layer and the release's
        fake-quantized weight. `tolerance` stands where a tensor need not be equal to the bit.

    Raises:
        UserError: `packed` is not packed, `checkpoint` not of the release, an option or the base
            does not fit the checkpoint, or the step that a branch was rebuilt for is unknown.
    """
    folder, base, packed = checkpoint_folder(checkpoint), find_folder(base), find_folder(packed)
    ours, theirs = Tensors(folder), read_json(packed / _CONFIG)
    if not is_released(ours):
        raise UserError(
            f"{folder} is no checkpoint of QVGen's release: no tensor has its names; give the one "
            f"that {packed} was imported from"
        )
    if not theirs.get("quantization_config"):
        raise UserError(f"{packed} is not packed; give the pipeline that the import made")
    fields, config = read_base(folder, base)
    plan, recipe = plan_released(config, ours.infos), recipe_of(config)
    given = (clip_index, bits, released_step, phase_steps, lora_alpha)
    options = _options(packed, theirs["quantization_config"], ReleasedOptions(*given))
    try:
        decay, scale = options.decay(plan, recipe.phase_steps), options.adapter_scale(plan)
    except UserError as error:
        raise UserError(f"{packed} is no such import of {folder}: {error}") from error
    held = Tensors(packed / "transformer")
    check = ReleasedCheck(ours, held, plan, options, decay, recipe.float32, scale)
    quant = options.quant(plan, check.rank)

    found = {}
    for name, entry in check.entries():
        found[name] = entry
        progress(len(found), len(held))
    origins = {path: base / path for path in companions(base)}
    origins |= {Path("transformer", card.name): card for card in cards(folder)}
    files = dict(compare_files(origins, packed))
    expected = fields, dataclasses.asdict(quant), options.record(decay)[RECORD]
    differences = list(_differences(expected, theirs))
    files[str(_CONFIG)] = "different" if differences else "equal"
    return certify(
        folder,
        packed,
        found,
        set(held) - set(found),
        files,
        base=str(base.resolve()),
        options=dataclasses.asdict(options) | {"bits": list(options.bits)},
        config=differences,
    )


def _options(packed: Path, quantization: Mapping, given: ReleasedOptions) -> ReleasedOptions:
    """What is given and, where it is None, recorded."""
    quant = read_quantization_config(quantization)
    changes = {name: x for name, x in dataclasses.asdict(given).items() if x is not None}
    options = dataclasses.replace(recorded(quantization, quant), **changes)
    if quant.rank and options.released_step is None:
        raise UserError(
            f"{packed} keeps a low-rank branch but does not say the step it was rebuilt for; give "
            "the released_step of its import, and its phase_steps if it had one"
        )
    return options


def _differences(expected: tuple[Mapping, Mapping, Mapping], fields: Mapping) -> Iterator[str]:
    """Every field of the packed config.json that is not as it must be, in words.

    Args:
        expected: the base's fields, those of the quantization, and the record of the import.
        fields: all of them, as they are.
    """
    quantization = fields["quantization_config"]
    found = (
        {key: value for key, value in fields.items() if key != "quantization_config"},
        dataclasses.asdict(read_quantization_config(quantization)),
        quantization.get(RECORD, expected[2]),  # An earlier version put nothing on record.
    )
    for one, other in zip(expected, found, strict=True):
        for key in sorted({*one, *other}):
            ours, theirs = (side.get(key, "absent") for side in (one, other))
            if ours != theirs:
                yield f"{key} is {theirs!r}, expected {ours!r}"
