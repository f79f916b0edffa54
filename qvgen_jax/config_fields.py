"""What the fields of a config file hold, checked against the annotations of the dataclass."""

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any

from qvgen_jax.errors import UserError

_EXPECTED = {float: "a number", bool: "true or false", str: "a string"}


def check_fields(
    config: Any,
    what: str,
    may_be_zero: Collection[str] = (),
    names: Mapping[str, str] | None = None,
) -> None:
    """Refuses a config whose values are not what its annotations say.

    Args:
        config: a dataclass of int, float, bool and str, tuples of one of them, and None.
        what: the file the values are from, as messages call it.
        may_be_zero: the fields whose whole numbers start at 0; those of all others start at 1.
        names: what the file calls the fields that have another name there.

    Raises:
        UserError: the first field with another value, see `check_value`.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        name, value = field.name, getattr(config, field.name)
        least = 0 if name in may_be_zero else 1
        check_value(value, kinds[name], (names or {}).get(name, name), what, least)


def check_value(value: Any, kind: Any, name: str, what: str, least: int = 1) -> None:
    """Refuses a value that is not of its kind.

    A whole number will do for a float, but not true or false for a whole number.

    Args:
        value: as read, with tuples for lists.
        kind: int, float, bool, str, `tuple[int, ...]`, `tuple[int, int, int]` or the like, or one
            of them `| None`.
        name: of the field.
        what: the file, as the message calls it.
        least: the smallest whole number.

    Raises:
        UserError: it names the file, the field, the value and what is expected.
    """
    if not _fits(value, kind, least):
        shown = list(value) if isinstance(value, tuple) else value
        raise UserError(f"{name} is {shown!r} in {what}, expected {_expected(kind, least)}")


def _fits(value: Any, kind: Any, least: int) -> bool:
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one, least) for one in inner)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            return False
        return all(_fits(one, inner[0], least) for one in value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= least
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        # False for NaN and for whole numbers that no float holds.
        return number and abs(value) <= sys.float_info.max
    return isinstance(value, kind)


def _expected(kind: Any, least: int) -> str:
    inner = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        named = [_expected(one, least) for one in inner if one is not types.NoneType]
        return " or ".join([*named, "null"])
    if typing.get_origin(kind) is tuple:
        count = "" if inner[-1] is ... else f" of {len(inner)} values"
        return f"a list{count}, each {_expected(inner[0], least)}"
    return f"a whole number from {least}" if kind is int else _EXPECTED[kind]
