"""The product of quantized tokens and quantized weights: one call, whatever the chip."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from kernels import xla
from kernels.choose import candidates, few_rows, module_of, say_once
from kernels.fused_quantize import per_row, quantize_several
from kernels.low_rank import LowRank, low_rank_hidden, low_rank_matmul
from kernels.operands import Product, Weight
from kernels.partition import over_rows
from kernels.quantize_tokens import QuantizedTokens, dequantize_tokens
from kernels.reference import wide_type
from kernels.target import target


def quantized_matmul(
    tokens: QuantizedTokens,
    weight: Weight,
    low_rank: LowRank | None = None,
    *,
    backend: str = "xla",
    layout: str = "rows",
    bits: tuple[int, int] = (8, 8),
    product_dtype: jnp.dtype = jnp.int8,
    out_dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """`dequantized tokens @ (dequantized weights + low-rank branch) + bias`.

    Training calls it with `xla`, whose arithmetic is the definition (`kernels.xla`); inference with
    the backend that `kernels.choose` names. Every backend has the same integers; float32
    corrections may round differently.

    Args:
        tokens: codes `[..., in]` and their statistics.
        weight: its codes in `layout`.
        low_rank: of checkpoints whose rank is not 0.
        backend: one of `kernels.choose.BACKENDS`. Where it does not take the product, XLA does, and
            the log says so once.
        layout: of the weight's codes, see `kernels.layouts`.
        bits: of weights and activations; at most 4 lie in int4.
        product_dtype: what XLA multiplies codes in, see `kernels.xla`.
        out_dtype: of the result.

    Returns:
        `[..., out]`.

    Raises:
        ValueError: an unknown backend, layout or product_dtype.
    """
    if low_rank is not None:
        values = dequantize_tokens(tokens).astype(out_dtype)
        y = _with_branch_inside(tokens, values, weight, low_rank, backend, layout, bits, out_dtype)
        if y is not None:
            return y
        wide = wide_type(out_dtype)
        how = {"backend": backend, "layout": layout, "bits": bits, "product_dtype": product_dtype}
        y = quantized_matmul(tokens, weight, **how, out_dtype=wide)
        return (y + low_rank_matmul(values, low_rank).astype(wide)).astype(out_dtype)
    product = _product(tokens.codes.shape, weight, bits, out_dtype)

    def device() -> jax.Array:
        run = partial(module_of(backend).quantized_matmul, bits=bits, out_dtype=out_dtype)
        return over_rows(run, _flat(tokens), weight)

    y = _attempt(backend, layout, product, device)
    if y is None:
        y = xla.quantized_matmul(
            tokens, weight, layout=layout, product_dtype=product_dtype, out_dtype=out_dtype
        )
    return y.reshape(*tokens.codes.shape[:-1], product.columns)


def _with_branch_inside(
    tokens: QuantizedTokens,
    values: jax.Array,
    weight: Weight,
    low_rank: LowRank,
    backend: str,
    layout: str,
    bits: tuple[int, int],
    out_dtype: jnp.dtype,
) -> jax.Array | None:
    """`quantized_matmul` by a kernel that adds the branch itself; None where there is none."""
    module = module_of(backend)
    if not getattr(module, "ADDS_LOW_RANK", False):
        return None
    product = _product(tokens.codes.shape, weight, bits, out_dtype)

    def run(by_row: tuple, whole: tuple) -> jax.Array:
        (flat, hidden), (weight, left) = by_row, whole
        how = {"bits": bits, "out_dtype": out_dtype}
        return module.quantized_matmul(flat, weight, low_rank=(hidden, left), **how)

    def device() -> jax.Array:
        by_row = _flat((tokens, low_rank_hidden(values, low_rank)))
        return over_rows(run, by_row, (weight, low_rank.left))

    y = _attempt(backend, layout, product, device)
    return None if y is None else y.reshape(*tokens.codes.shape[:-1], product.columns)


def _flat(arrays: Any) -> Any:
    """Each array `[..., features]` of a pytree as `[rows, features]`."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), arrays)


def quantize_and_matmul(
    x: jax.Array,
    lower: jax.Array,
    upper: jax.Array,
    levels: jax.Array,
    weight: Weight,
    *,
    include_zero: bool = True,
    clip_ratio: float = 1.0,
    range_dtype: jnp.dtype = jnp.float32,
    backend: str = "xla",
    layout: str = "rows",
    bits: tuple[int, int] = (8, 8),
    product_dtype: jnp.dtype = jnp.int8,
    out_dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    """`quantized_matmul` of tokens that are still floats, quantized on the way where that is free.

    On TPU the tokens become codes in the product's prologue and are never written to memory.

    Args:
        x: `[batch, ..., in]`.
        lower, upper, levels, include_zero, clip_ratio, range_dtype: see `quantize_tokens`.

    The others, and what is returned and raised, are as in `quantized_matmul`.
    """
    product = _product(x.shape, weight, bits, out_dtype)
    module = module_of(backend)
    if hasattr(module, "quantize_and_matmul") and jnp.dtype(range_dtype) == jnp.float32:

        def run(by_row: tuple, whole: tuple) -> jax.Array:
            return module.quantize_and_matmul(
                *by_row,
                *whole,
                include_zero=include_zero,
                clip_ratio=clip_ratio,
                bits=bits,
                out_dtype=out_dtype,
            )

        def device() -> jax.Array:
            rows = (x.reshape(-1, x.shape[-1]), per_row(lower, x), per_row(upper, x))
            return over_rows(run, rows, (levels, weight))

        y = _attempt(backend, layout, product, device)
        if y is not None:
            return y.reshape(*x.shape[:-1], product.columns)
    tokens = quantize_several(
        x,
        [(lower, upper)],
        levels,
        backend=backend,
        include_zero=include_zero,
        clip_ratio=clip_ratio,
        range_dtype=range_dtype,
    )[0]
    return quantized_matmul(
        tokens,
        weight,
        backend=backend,
        layout=layout,
        bits=bits,
        product_dtype=product_dtype,
        out_dtype=out_dtype,
    )


def _product(shape: tuple, weight: Weight, bits: tuple, out_dtype: jnp.dtype) -> Product:
    rows, columns = math.prod(shape[:-1]), weight.scale.shape[-1]
    return Product(rows, shape[-1], columns, *bits, jnp.dtype(out_dtype))


def _attempt(
    backend: str, layout: str, product: Product, device: Callable[[], jax.Array]
) -> jax.Array | None:
    """What `device` gives; None where XLA has to, which is said once with the reason."""
    module = module_of(backend)
    if module is xla or few_rows(product):  # Few rows go to XLA by design: nothing to report.
        return None
    try:
        here = target()
        if backend not in candidates(here):
            raise NotImplementedError(f"it has no kernel for {here.name}")
        module.check(product)
        if layout != module.layout(product):
            raise NotImplementedError(
                f"it wants codes in layout {module.layout(product)!r}, not {layout!r}"
            )
        return device()
    except NotImplementedError as reason:
        say_once(f"{backend} does not take {product}: {reason}; XLA does")
        return None
