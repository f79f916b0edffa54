"""The chip that programs are being built for: this machine's, unless another one is named."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import jax

from kernels.chips import Chip, chip_of

_NAMED: ContextVar[Chip | None] = ContextVar("target", default=None)


def target() -> Chip:
    """The chip of `building_for`, else this machine's first device."""
    return _NAMED.get() or chip_of(jax.devices()[0])


@contextmanager
def building_for(chip: Chip) -> Iterator[None]:
    """What is traced here is meant for `chip`, which need not be attached."""
    token = _NAMED.set(chip)
    try:
        yield
    finally:
        _NAMED.reset(token)
