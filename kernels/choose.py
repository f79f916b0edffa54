"""Which backend takes a product: by chip, shape and bits, from one small table."""

import importlib
import logging
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from kernels import xla
from kernels.chips import Chip
from kernels.operands import Product
from kernels.target import target

_LOG = logging.getLogger("kernels")

_MODULES = {
    "xla": "kernels.xla",
    "tpu": "kernels.tpu",
    "hopper": "kernels.hopper",
    "triton": "kernels.triton_matmul",
}
BACKENDS = tuple(_MODULES)

# Rows below which a kernel of whole tiles multiplies mostly padding; XLA's dot reads the weights
# as fast.
_FEW_ROWS = 16


class Choice(NamedTuple):
    """A backend for a product, why, and how it wants the weight's codes (`kernels.layouts`)."""

    backend: str
    reason: str
    layout: str


def candidates(chip: Chip) -> tuple[str, ...]:
    """Backends in the order in which a chip tries them; the last takes everything."""
    if chip.platform == "tpu":
        return ("tpu", "xla")
    if chip.platform == "gpu" and chip.capability is not None:
        if chip.capability == (9, 0):
            return ("hopper", "triton", "xla")
        if (8, 0) <= chip.capability < (9, 0):
            return ("triton", "xla")
    return ("xla",)


def module_of(backend: str) -> ModuleType:
    """The backend's file.

    Raises:
        ValueError: an unknown name.
    """
    if backend not in _MODULES:
        raise ValueError(f"backend={backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    return importlib.import_module(_MODULES[backend])


def layout_of(backend: str, product: Product, chip: Chip) -> str:
    """How a backend wants the codes of a product's weight."""
    if backend == "xla":
        return xla.layout(product, chip.platform)
    return module_of(backend).layout(product)


def choose(product: Product, chip: Chip | None = None, asked: str = "auto") -> Choice:
    """The backend for a product.

    Args:
        product: its `rows` may be unknown.
        chip: `kernels.target` if None.
        asked: "auto", or a backend's name, which is then the first that is tried.

    Raises:
        ValueError: `asked` is no backend.
    """
    chip = target() if chip is None else chip
    order: Sequence[str] = candidates(chip)
    if asked != "auto":
        module_of(asked)
        order = tuple(dict.fromkeys((asked, "xla")))
    refusals = []
    for name in order:
        try:
            _check(name, product, chip)
        except NotImplementedError as reason:
            refusals.append(f"{name} does not: {reason}")
            continue
        why = "asked for" if name == asked else _why(name, chip)
        return Choice(name, "; ".join([why, *refusals]), layout_of(name, product, chip))
    raise AssertionError("xla takes everything")


def _check(name: str, product: Product, chip: Chip) -> None:
    if name == "xla":
        return
    if name not in candidates(chip):
        takes = ", ".join(candidates(chip))
        raise NotImplementedError(f"it has no kernel for {chip.name}, which has {takes}")
    if few_rows(product):
        raise NotImplementedError(f"{product.rows} rows are fewer than {_FEW_ROWS}")
    module_of(name).check(product, chip)


def few_rows(product: Product) -> bool:
    """Whether it has fewer rows than a kernel of tiles is for."""
    return product.rows is not None and product.rows < _FEW_ROWS


def _why(name: str, chip: Chip) -> str:
    if name == "hopper":
        return "s8 wgmma, the fastest integer unit of sm_90"
    if name == "triton":
        return "s8 tensor cores, portable over GPUs"
    if name == "tpu":
        return "fp8 codes" if not chip.int4 else "int4 matrix unit, half the slots of int8"
    return "XLA's int8 dot"


_said: set[str] = set()


def say_once(message: str) -> None:
    """Log a fallback the first time that it happens."""
    if message not in _said:
        _said.add(message)
        _LOG.warning(message)
