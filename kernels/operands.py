"""What a low-bit product is made of, and what a backend is asked before it takes one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

LONGEST_INT32_SUM = 2**31 // 2**14 - 1
"""So many products of two 8-bit codes, each up to 2^14, stay within int32 whatever they are."""


class Weight(NamedTuple):
    """A quantized kernel as a backend keeps it on the device.

    Attributes:
        codes: signed, in the backend's layout (`kernels.layouts`).
        scale: float32 `[out]`.
        zero_point: float32 `[out]`, a real number, signed like the codes; None where it is 0, which
            makes two of the product's three corrections vanish.
        code_sum: float32 `[out]`, the codes summed over the input axis.
        bias: float32 `[out]` or None.
    """

    codes: jax.Array
    scale: jax.Array
    zero_point: jax.Array | None
    code_sum: jax.Array
    bias: jax.Array | None = None


class Product(NamedTuple):
    """What a backend needs to know of `[rows, inner] @ [inner, columns]` to take it or refuse.

    Attributes:
        rows: tokens; None where it is not known yet, as when weights are laid out at load.
        weight_bits, act_bits: 2 to 8; up to 4 lie in int4.
        out_dtype: bfloat16 or float32.
    """

    rows: int | None
    inner: int
    columns: int
    weight_bits: int = 4
    act_bits: int = 4
    out_dtype: jnp.dtype = jnp.bfloat16

    def __str__(self) -> str:
        rows = "?" if self.rows is None else self.rows
        bits = f"W{self.weight_bits}A{self.act_bits}"
        return f"{rows} x {self.inner} x {self.columns} {bits} to {jnp.dtype(self.out_dtype).name}"
