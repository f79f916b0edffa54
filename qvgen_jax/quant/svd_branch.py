"""SVDQuant's branch: what is largest in a smoothed kernel stays in 16 bits, the rest is quantized.

Source: arXiv 2411.05007, section 4.2: `W s = L R + residual`, rank 32. The released code
(mit-han-lab/deepcompressor, `calib/lowrank.py`) goes on: the branch then takes what the residual's
quantization left, and so on while the outputs come nearer.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from qvgen_jax.quant.low_rank import initial_branch
from qvgen_jax.quant.token_error import Branch, branch_weight, outputs, product, relative


def svd_branch(kernel: jax.Array, rank: int) -> tuple[Branch, jax.Array]:
    """The best branch of that rank for a kernel `[in, out]`, and the residual `[in, out]`.

    What the branch cannot say in bfloat16, as it is stored, stays in the residual.
    """
    branch = stored(Branch(*initial_branch(kernel, jnp.zeros_like(kernel), rank)))
    return branch, kernel - branch_weight(branch)


def stored(branch: Branch) -> Branch:
    """Rounded to bfloat16, in float32."""
    return Branch(*(side.astype(jnp.bfloat16).astype(jnp.float32) for side in branch))


def refined_branch(
    kernel: jax.Array,
    rank: int,
    quantized: Callable[[jax.Array], jax.Array],
    rows: jax.Array,
    act_levels: jax.Array,
    iterations: int,
) -> tuple[Branch, jax.Array]:
    """`svd_branch`, then of what quantization loses, as long as the outputs come nearer.

    Args:
        kernel: float32 `[in, out]`, smoothed and rotated.
        rank: of the branch.
        quantized: of a residual `[in, out]`: what its codes stand for.
        rows: `[rows, in]` of tokens, prepared likewise.
        act_levels: `[]`, of the tokens.
        iterations: at most so many SVDs; 1 is the paper's.

    Returns:
        The branch and the residual that leave the least error on the rows.
    """
    expected = product(rows, kernel)

    def attempt(target: jax.Array) -> tuple:
        branch = stored(Branch(*initial_branch(target, jnp.zeros_like(target), rank)))
        residual = kernel - branch_weight(branch)
        found = quantized(residual)
        return branch, found, relative(outputs(rows, found, act_levels, branch), expected)

    def goes_on(carry: tuple) -> jax.Array:
        done, better = carry[0], carry[1]
        return (done < iterations) & better

    def step(carry: tuple) -> tuple:
        done, _, best, found, error = carry
        branch, after, now = attempt(kernel - found)
        better = now < error
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), branch, best)
        return done + 1, better, kept, after, jnp.minimum(now, error)

    start = (jnp.int32(1), jnp.bool_(True), *attempt(kernel))
    branch = jax.lax.while_loop(goes_on, step, start)[2]
    return branch, kernel - branch_weight(branch)
