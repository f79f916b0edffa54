"""How many inputs a fuzz test tries, from which seed, and what became of them.

QVGEN_FUZZ multiplies the small numbers that `make test` takes: 50 is the whole campaign.
QVGEN_FUZZ_SEED is the seed; 0, the same inputs every time, where it is not given.
"""

import contextlib
import os
import random
from collections import Counter
from collections.abc import Callable, Iterator

import hypothesis

from qvgen_jax.errors import UserError

SEED = int(os.environ.get("QVGEN_FUZZ_SEED", "0"))
LONGEST_MESSAGE = 6000  # Characters: more than a terminal shows is no message.
TALLY: dict[str, Counter] = {}
"""By entrance: how many inputs were `tried`, `refused` and `right`; what is missing failed."""


def count(default: int) -> int:
    """How many inputs to try where `make test` tries `default`."""
    return max(1, round(default * float(os.environ.get("QVGEN_FUZZ", "1"))))


def drawn(default: int) -> Callable:
    """Decorates a test of `hypothesis.given`: the number of its examples, their seed, no time limit
    for one of them alone."""

    def decorate(test: Callable) -> Callable:
        settings = hypothesis.settings(
            max_examples=count(default),
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate,),  # Shrinking takes minutes where a file is written.
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        return hypothesis.seed(SEED)(settings(test))

    return decorate


def generators(name: str, default: int) -> Iterator[tuple[str, random.Random]]:
    """One random generator per input, and what to call the input where it fails."""
    for index in range(count(default)):
        label = f"{name}, seed {SEED}, input {index}"
        yield label, random.Random(label)


@contextlib.contextmanager
def tried(entrance: str) -> Iterator[None]:
    """Counts one input: inside it is read, and what was read is verified.

    A UserError that says something is a refusal, nothing raised is right, all else is a failure.
    """
    tally = TALLY.setdefault(entrance, Counter())
    tally["tried"] += 1
    try:
        yield
    except UserError as error:
        tally["refused"] += 1
        if not 20 <= len(str(error)) <= LONGEST_MESSAGE:
            raise AssertionError(f"a message of {len(str(error))} characters") from error
    else:
        tally["right"] += 1
