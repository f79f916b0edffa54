"""What the fields of a config file hold, checked against the annotations of the dataclass.

An annotation says the type and, where not every number will do, the range:

    num_layers: int = 40                                        # a whole number from 1
    eps: Positive = 1e-6                                        # a number above 0
    buckets: Annotated[int, Range(least=4)] = 32                # a whole number from 4
"""

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from qvgen_jax.errors import UserError

_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field may hold, for `Annotated`.

    Attributes:
        least: the smallest of them.
        above: what all of them are greater than.
        below: what all of them are smaller than.
        even: whether only even ones are among them.
    """

    least: float = -math.inf
    above: float = -math.inf
    below: float = math.inf
    even: bool = False

    def __contains__(self, value: float) -> bool:
        inside = self.least <= value < self.below and value > self.above
        return inside and not (self.even and value % 2)

    def __str__(self) -> str:
        ends = (("from", self.least), ("above", self.above), ("below", self.below))
        words = [f"{word} {end}" for word, end in ends if math.isfinite(end)]
        return " and ".join([*words, *(["even"] if self.even else [])])


Positive = Annotated[float, Range(above=0)]
MOST_LEVELS = 12
"""Of a VAE: each halves the video, and more leave nothing of it."""
Layers = Annotated[int, Range(least=1, below=1000)]  # Of what has names of its own.
Few = Annotated[int, Range(least=1, below=100)]  # Of what is built one by one.
Even = Annotated[int, Range(least=2, even=True)]

_LONGEST = 4096  # Of lists: the longest has as many values as there are latent channels.
_LARGEST = 2**31 - 1  # Of sizes and counts: XLA's.

# Of a plain annotation: sizes and counts are nowhere 0, numbers may be anything finite.
_PLAIN = {int: Range(least=1), float: Range()}


def check_fields(config: Any, what: str, names: Mapping[str, str] | None = None) -> None:
    """Refuses a config whose values are not what its annotations say.

    Args:
        config: a dataclass of the kinds that `check_value` knows.
        what: the file the values are from, as messages call it.
        names: what the file calls the fields that have another name there.

    Raises:
        UserError: the first field with another value, see `check_value`.
    """
    kinds = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name = (names or {}).get(field.name, field.name)
        check_value(getattr(config, field.name), kinds[field.name], name, what)


def check_value(value: Any, kind: Any, name: str, what: str) -> None:
    """Refuses a value that is not of its kind.

    A whole number will do for a float, but not true or false for a whole number.

    Args:
        value: as read, with tuples for lists.
        kind: int, float, bool or str, a number `Annotated` with its `Range`, `tuple[int, ...]`,
            `tuple[int, int, int]` or the like, or one of them `| None`. An int without a range is
            at least 1.
        name: of the field.
        what: the file, as the message calls it.

    Raises:
        UserError: see `refusal`.
    """
    if not _fits(value, kind):
        raise refusal(name, value, what, _expected(kind))


def refusal(name: str, value: Any, what: str, expected: str) -> UserError:
    """What is said of a value in a file: the field, the value, the file, expectation and remedy.

    For what no annotation can say, such as how two fields depend on each other.
    """
    shown = repr(list(value) if isinstance(value, tuple) else value)
    shown = shown if len(shown) < 500 else f"{shown[:500]}..."
    return UserError(
        f"{name} is {shown} in {what}, expected {expected}; "
        "correct it there, or fetch the file again"
    )


def _is_union(kind: Any) -> bool:
    # `int | None` is the one, `Positive | None` the other.
    return typing.get_origin(kind) in (types.UnionType, typing.Union)


def _number(kind: Any) -> tuple[Any, Range | None]:
    """The type and the range of a kind that is no tuple and no union."""
    if typing.get_origin(kind) is Annotated:
        return typing.get_args(kind)
    return kind, _PLAIN.get(kind)


def _fits(value: Any, kind: Any) -> bool:
    inner = typing.get_args(kind)
    if isinstance(value, tuple) and len(value) > _LONGEST:
        return False
    if _is_union(kind):
        return any(_fits(value, one) for one in inner)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, tuple) or (inner[-1] is not ... and len(value) != len(inner)):
            return False
        return all(_fits(one, inner[0]) for one in value)
    kind, numbers = _number(kind)
    if numbers is None:
        return isinstance(value, kind)
    if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
        return False
    # The bound is False for NaN, infinity and whole numbers that no float holds.
    return abs(value) <= (_LARGEST if kind is int else sys.float_info.max) and value in numbers


def _expected(kind: Any) -> str:
    inner = typing.get_args(kind)
    if _is_union(kind):
        named = [_expected(one) for one in inner if one is not types.NoneType]
        return " or ".join([*named, "null"])
    if typing.get_origin(kind) is tuple:
        count = "" if inner[-1] is ... else f" of {len(inner)} values"
        return f"a list{count}, each {_expected(inner[0])}"
    kind, numbers = _number(kind)
    return f"{_EXPECTED[kind]} {numbers or ''}".rstrip()
