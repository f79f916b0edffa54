"""How tests compile: `conftest.py` leaves LLVM's optimizations out."""

from collections.abc import Callable

import jax


def optimized(function: Callable) -> Callable:
    """`function` compiled with LLVM's first level of optimizations.

    For bits of two programs of one formula: without any, products and sums become one operation in
    some places and not in others.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "1"})
