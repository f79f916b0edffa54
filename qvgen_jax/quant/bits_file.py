"""The bits of every layer as a file: what a plan writes and `quant.bits_file` names."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object, write_json
from qvgen_jax.quant.blocks import in_block, split_block

Entry = tuple[str, int, int]
"""A layer's name, and its bits of weights and activations, as in `quant.bits`."""


def write_bits(path: Path, bits: Mapping[str, tuple[int, int]], made_by: Mapping[str, Any]) -> None:
    """Writes the file.

    Args:
        bits: of every layer, by its own name.
        made_by: what one wants to know of it later; not read.
    """
    write_json(path, {"bits": grouped(bits), "made_by": dict(made_by)})


def grouped(bits: Mapping[str, tuple[int, int]]) -> list[Entry]:
    """The same in few entries: what most blocks have, and the blocks that differ."""
    kinds: dict[str, dict[int | None, tuple[int, int]]] = {}
    for name, pair in bits.items():
        block, kind = split_block(name)
        kinds.setdefault(kind, {})[block] = tuple(pair)
    entries: list[Entry] = []
    for kind, by_block in kinds.items():
        usual = Counter(by_block.values()).most_common(1)[0][0]
        entries.append((kind, *usual))
        entries += [
            (in_block(kind, block), *pair) for block, pair in by_block.items() if pair != usual
        ]
    return entries


def read_bits(path: str | Path) -> tuple[Entry, ...]:
    """The entries of a file.

    Raises:
        UserError: it is missing, holds something else, or names a layer twice.
    """
    remedy = "give the bits.json that --job mixed wrote"
    entries = read_object(Path(path), remedy).get("bits")
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and [type(part) for part in entry] == [str, int, int]
        for entry in entries
    ):
        raise UserError(
            f"{path} has no list 'bits' of [layer's name, weight bits, activation bits]; {remedy}"
        )
    if names := named_twice(entries):
        raise UserError(f"{path} names {', '.join(names)} more than once; {remedy}")
    return tuple(tuple(entry) for entry in entries)


def named_twice(entries: Iterable[Sequence]) -> list[str]:
    """The layers with more than one entry, of which the last alone would count."""
    return [name for name, count in Counter(entry[0] for entry in entries).items() if count > 1]


def with_bits_file(config: dict) -> dict:
    """The config with what its `quant.bits_file` says in `quant.bits`, and that file forgotten.

    A run then records its bits, and a file that changes makes it another run.

    Args:
        config: plain dicts; one without a `quant` section, or without the key, stays as it is.

    Raises:
        UserError: see `read_bits`; or the config has bits of its own too.
    """
    quant = config.get("quant", {})
    file = quant.get("bits_file", "")
    if not isinstance(file, str) or not file:
        return config
    if quant["bits"]:
        raise UserError(
            f"--config.quant.bits_file={file} and quant.bits={quant['bits']!r} both say what "
            "layers get; leave one of them empty"
        )
    return {**config, "quant": {**quant, "bits": read_bits(file), "bits_file": ""}}
