"""Device layouts of weight codes, made at load from the one on-disk format.

| layout | array | who wants it |
|---|---|---|
| `rows` | int4 or int8 `[in, out]` | TPU, where int4 takes half a byte |
| `columns` | int4 or int8 `[out, in]` | Hopper: 8-bit wgmma wants both operands input-contiguous |
| `rows_halved` | int8 `[ceil(in / 2), out]` | CPU, where XLA gives an int4 a whole byte |
| `columns_halved` | int8 `[out, ceil(in / 2)]` | Triton, which knows no int4 |

Halved, for up to 4 bits: byte k holds the code of input k in its low nibble and of input
`k + ceil(in / 2)` in its high one, so that either half is one shift away and neither is shuffled.
An odd end is filled with code 0.
"""

import jax
import jax.numpy as jnp
import numpy as np

LAYOUTS = ("rows", "columns", "rows_halved", "columns_halved")


def container(bits: int, layout: str) -> jnp.dtype:
    """What codes of so many bits live in.

    Raises:
        ValueError: an unknown layout, or a halved one for more than 4 bits.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}; expected one of {', '.join(LAYOUTS)}")
    if layout.endswith("_halved"):
        if bits > 4:
            raise ValueError(f"{bits}-bit codes do not fit layout {layout!r}, two a byte")
        return jnp.dtype(jnp.int8)
    return jnp.dtype(jnp.int4 if bits <= 4 else jnp.int8)


def laid_out_shape(inner: int, columns: int, layout: str) -> tuple[int, int]:
    """Of the array that holds codes `[inner, columns]`."""
    inner = -(-inner // 2) if layout.endswith("_halved") else inner
    return (inner, columns) if layout.startswith("rows") else (columns, inner)


def lay_out(codes: jax.Array, bits: int, layout: str) -> jax.Array:
    """Signed codes int8 `[..., in, out]` in a layout; numpy arrays stay on the host."""
    dtype = container(bits, layout)
    if layout.endswith("_halved"):
        half = -(-codes.shape[-2] // 2)
        low, high = codes[..., :half, :], codes[..., half:, :]
        if high.shape[-2] < half:
            widths = [(0, 0)] * (codes.ndim - 2) + [(0, 1), (0, 0)]
            high = (jnp if isinstance(codes, jax.Array) else np).pad(high, widths)
        codes = (high.astype("uint8") << 4 | (low.astype("uint8") & 15)).astype("int8")
    if layout.startswith("columns"):
        codes = codes.swapaxes(-1, -2)
    return codes.astype(dtype)


def halves(codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two halves of halved codes, int8: of inputs below `ceil(in / 2)`, and of the others."""
    return (codes << 4) >> 4, codes >> 4


def unlay(codes: jax.Array, inner: int, layout: str) -> jax.Array:
    """The inverse of `lay_out`: int8 `[..., inner, out]`."""
    if layout.startswith("columns"):
        codes = codes.swapaxes(-1, -2)
    if layout.endswith("_halved"):
        codes = jnp.concatenate(halves(codes), axis=-2)[..., :inner, :]
    return codes.astype(jnp.int8)
