"""The train state, a plain dict, and what happens to it at a phase boundary.

`{"params", "levels", "opt", "step"}`: `params` are the student's float32 master weights with its
quantizers and branch, `levels` the number of levels per layer (not trained), `opt` the optimizer's
state, `step` the number of updates made. Random keys and the data position are functions of `step`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from qvgen_jax.quant.low_rank import drop_branch, refactor_tree, zero_branch
from qvgen_jax.quant.schedule import RankDecay, is_boundary, phase_rank


def create_state(params: dict, levels: dict, optimizer: optax.GradientTransformation) -> dict:
    """A state at step 0 from initialised (quantized) parameters."""
    # Copies: both clips start as one array, and a buffer can be donated only once.
    params = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), params)
    return {
        "params": params,
        "levels": levels,
        "opt": optimizer.init(params),
        "step": jnp.zeros((), jnp.int32),
    }


@partial(jax.jit, donate_argnums=0, static_argnames="moments")
def _refactor(state: dict, rank: jax.Array, moments: str) -> dict:
    opt = zero_branch(state["opt"]) if moments == "reset" else state["opt"]
    return {**state, "params": refactor_tree(state["params"], rank), "opt": opt}


def enter_step(state: dict, step: int, decay: RankDecay, moments: str = "reset") -> dict:
    """What must happen before the update of `step`: refactor at a boundary, drop at rank 0.

    Args:
        state: the state after `step` updates.
        step: a Python int.
        decay: when each phase begins.
        moments: "reset" zeroes Adam's moments of L and R when they are refactored, "keep" leaves
            them as the release does.
    """
    if not is_boundary(step, decay):
        return state
    rank = phase_rank(step, decay)
    if rank > 0:
        return _refactor(state, jnp.int32(rank), moments)
    return {**state, "params": drop_branch(state["params"]), "opt": drop_branch(state["opt"])}


def has_branch(decay: RankDecay, step: int) -> bool:
    """Whether a state saved after `step` updates still holds L and R."""
    return phase_rank(max(step - 1, 0), decay) > 0
