"""Tokens rotated by a block-Hadamard matrix before they are quantized (QuaRot, arXiv 2404.00456).

It spreads an outlier of one channel over its block, so that the others keep their codes. The kernel
holds the rotated weight from step 0 on, and `(x Q) @ (Q^T W) = x @ W`.

Q consists of equal blocks `S H S / sqrt(block)`: H is Sylvester's Hadamard matrix and S a diagonal
of signs. Q is symmetric and its own inverse, so one function rotates tokens, kernels and gradients.
The signs are there because H alone gathers what a block's channels have in common in one channel:
at 4 bits GELU's outputs, which are positive on average, lose 24 % instead of 14 %. They are
Shapiro's sequence, whose transform is flat, and need no seed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kernels.reference import at_least_float32, wide_type

# A longer block spreads further (an outlier at 30 sigma: 49 % of error without, 15 % at 128, 13 %
# at 256, 12 % at 512) but costs more: up to 256 the product takes about as long as reading and
# writing the tokens does, where a bfloat16 matrix unit and the memory are balanced as in an H200.
LARGEST_BLOCK = 256


def block_size(width: int) -> int:
    """How many channels one block mixes: the largest power of two in `width`, up to 256."""
    return min(width & -width, LARGEST_BLOCK)


@functools.cache
def _signs(block: int) -> np.ndarray:
    """`S H S`, int8 `[block, block]`."""
    hadamard = np.ones((1, 1), np.int8)
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    shapiro = np.array([(-1) ** (i & (i >> 1)).bit_count() for i in range(block)], np.int8)
    return shapiro[:, None] * hadamard * shapiro


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def rotate(x: jax.Array, block: int) -> jax.Array:
    """`x Q` over the last axis: `[..., width]` in the dtype of `x`.

    Args:
        x: `[..., width]`; `width` is a multiple of `block`.
        block: a power of two; 1 changes nothing.
    """
    if block == 1:
        return x
    # Signs are exact in every dtype, 1 / sqrt(block) is not: it multiplies the float32 sum.
    # The axes before the last stay apart: over a mesh each may be cut its own way.
    y = jnp.matmul(
        x.reshape(*x.shape[:-1], -1, block),
        jnp.asarray(_signs(block), x.dtype),
        precision="highest",
        preferred_element_type=wide_type(x.dtype),
    )
    return (y * jnp.asarray(block**-0.5, y.dtype)).reshape(x.shape).astype(x.dtype)


def _forward(x, block):
    return rotate(x, block), None


def _backward(block, residuals, cotangent):
    # Q is symmetric. JAX's own transpose would multiply in float32 what is bfloat16.
    del residuals
    return (rotate(cotangent, block),)


rotate.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="block")
def rotate_kernel(kernel: jax.Array, block: int) -> jax.Array:
    """`Q^T W` over the input axis: `kernel [..., in, out]` to float32 (or float64) of its shape."""
    kernel = at_least_float32(kernel)
    if block == 1:
        return kernel
    *stack, fan_in, fan_out = kernel.shape
    blocks = kernel.reshape(*stack, fan_in // block, block, fan_out)
    matrix = jnp.asarray(_signs(block) * block**-0.5, kernel.dtype)
    return jnp.einsum("ij,...jo->...io", matrix, blocks, precision="highest").reshape(kernel.shape)
