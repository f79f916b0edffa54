"""How a Triton program becomes part of a JAX program, or why it cannot.

jax-triton compiles the program to PTX while JAX lowers and gives the driver the rest to do, so that
lowering for a GPU needs JAX's CUDA plugin but no GPU. `interpret` runs the program in Triton's own
interpreter instead, in numpy on the host; Triton decides that once, when it is imported.
"""

import functools
import importlib
import inspect
from collections.abc import Mapping, Sequence
from importlib import metadata
from types import ModuleType
from typing import Any

import jax
import numpy as np
from packaging.requirements import Requirement

from kernels.target import target

# Newer versions of PTX, Triton's default, are refused by drivers and assemblers of CUDA 12.
_PTX_VERSION = 87
_TRITON_NAMES = {"int8": "i8", "int32": "i32", "float32": "fp32", "bfloat16": "bf16"}


def triton_module(name: str) -> ModuleType:
    """`kernels.<name>`, a file of Triton programs.

    Raises:
        NotImplementedError: triton is not installed.
    """
    try:
        return importlib.import_module(f"kernels.{name}")
    except ImportError as error:
        if (error.name or "").split(".")[0] != "triton":
            raise
        raise NotImplementedError("triton is not installed; pip install triton") from error


def compute_capability() -> int:
    """Of `kernels.target`: 80, 89, 90, ...

    Raises:
        NotImplementedError: it is no NVIDIA GPU, or one before Ampere.
    """
    chip = target()
    if chip.platform != "gpu" or chip.capability is None:
        raise NotImplementedError("Triton needs a CUDA device, and JAX sees none")
    if chip.capability < (8, 0):
        version = ".".join(map(str, chip.capability))
        raise NotImplementedError(
            f"{chip.name} has compute capability {version}; the Triton kernels use 8-bit "
            "tensor-core instructions of 8.0 (Ampere) and later"
        )
    return 10 * chip.capability[0] + chip.capability[1]


def launch(
    program: Any,
    arguments: Sequence[jax.Array | int],
    outputs: Sequence[jax.ShapeDtypeStruct],
    constants: Mapping[str, Any],
    *,
    grid: int,
    warps: int,
    stages: int,
    capability: int | None,
    interpret: bool = False,
) -> list[jax.Array]:
    """Runs a `triton.jit` function: its parameters are the arguments, outputs and constants.

    Floating-point operations are not contracted: codes and corrections are those of the definition.

    Args:
        grid: programs, along one axis.
        capability: 80, 89, 90, ...; not needed to interpret.

    Raises:
        NotImplementedError: jax-triton is not installed or wants another triton, or interpretation
            was not asked for before triton was imported.
    """
    if interpret:
        return _interpret(program, arguments, outputs, constants, grid)
    try:
        from jax_triton import triton_call
    except ImportError as error:  # Also where JAX was installed without CUDA.
        reason = str(error).split("\n")[0].split(". ")[0]
        raise NotImplementedError(f"jax-triton cannot be used: {reason}") from error
    _check_once()
    if "backend_options" in inspect.signature(triton_call).parameters:
        options = {
            "out_type": list(outputs),
            "backend_options": {"ptx_version": _PTX_VERSION, "enable_fp_fusion": False},
        }
    else:  # jax-triton 0.3, for jax 0.10.
        options = {"out_shape": list(outputs), "enable_fp_fusion": False}
    return triton_call(
        *arguments,
        kernel=program,
        grid=(grid,),
        num_warps=warps,
        num_stages=stages,
        compute_capability=capability,
        **options,
        **constants,
    )


def check_triton() -> None:
    """Refuses a triton that jax-triton imports but cannot use, such as one that torch pins.

    Raises:
        NotImplementedError: its version is none that jax-triton asks for.
    """
    try:
        found = metadata.version("triton")
    except metadata.PackageNotFoundError:  # A build that goes by another name.
        return
    for line in metadata.requires("jax-triton") or ():
        wanted = Requirement(line)
        if wanted.name == "triton" and not wanted.specifier.contains(found, prereleases=True):
            raise NotImplementedError(
                f"jax-triton {metadata.version('jax-triton')} needs {wanted}, and triton {found} "
                f"is installed; pip install '{wanted}'"
            )


_check_once = functools.cache(check_triton)  # Not for every kernel that is traced.


class _Buffer:
    """A numpy array as Triton's interpreter expects a tensor on a device: an address and a type."""

    def __init__(self, array: np.ndarray):
        self.array = array
        self.dtype = _TRITON_NAMES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    # What the interpreter does to bring a tensor to the host, where this one is already.
    def untyped_storage(self):
        return self

    def cpu(self):
        return self

    def new_empty(self, *_, **__):
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return self.array.strides

    def set_(self, *_):
        pass

    def copy_(self, _):
        pass


def _interpret(program, arguments, outputs, constants, grid) -> list[jax.Array]:
    if type(program).__name__ != "InterpretedFunction":
        raise NotImplementedError(
            "Triton was imported to compile; set TRITON_INTERPRET=1 before Python starts"
        )
    numbers = {i: value for i, value in enumerate(arguments) if isinstance(value, int)}
    arrays = [value for value in arguments if not isinstance(value, int)]

    def run(*arrays):
        # Copies: the host may hand over buffers that are read-only or not contiguous.
        values = iter(_Buffer(np.array(array)) for array in arrays)
        inputs = [
            numbers[i] if i in numbers else next(values) for i in range(len(arrays) + len(numbers))
        ]
        results = [np.zeros(output.shape, output.dtype) for output in outputs]
        program[(grid,)](*inputs, *map(_Buffer, results), **constants)
        return results

    return jax.pure_callback(run, list(outputs), *arrays)
