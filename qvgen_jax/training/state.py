"""The train state, a plain dict, and what happens to it at a phase boundary.

`{"params", "levels", "opt", "step", "order", "skipped"}`: `params` are the student's float32 master
weights with its quantizers and branch, `levels` what of a layer is not trained (its numbers of
levels, the factors of smoothing), `opt` the optimizer's state, `step` the number of updates made or
skipped. With an average of the weights also `"ema"`, like `params` but without the branch. Random
keys and the data position are functions of `step` and of `order`, how often the run went back for
another order; `skipped` counts updates that were not finite, `in_a_row` up to now and `in_all`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import optax

from kernels.reference import at_least_float32
from qvgen_jax.quant.low_rank import (
    change_of_basis,
    cut_tree,
    drop_branch,
    refactor_tree,
    replace_branches,
    zero_branch,
)
from qvgen_jax.quant.schedule import RankDecay, is_boundary, phase_rank
from qvgen_jax.training.optimizer import split_frozen


def create_state(
    params: dict,
    levels: dict,
    optimizer: optax.GradientTransformation,
    average: bool = False,
    freeze_weights: bool = False,
) -> dict:
    """A state at step 0 from initialised (quantized) parameters, with `ema` if `average`.

    The optimizer's state is of what trains alone.
    """
    # Copies: both clips start as one array, and a buffer can be donated only once.
    params = jax.tree.map(lambda leaf: jnp.array(at_least_float32(leaf)), params)
    return {
        "params": params,
        "levels": levels,
        "opt": optimizer.init(split_frozen(params, freeze_weights)[0]),
        "step": jnp.zeros((), jnp.int32),
        "order": jnp.zeros((), jnp.int32),
        "skipped": {"in_a_row": jnp.zeros((), jnp.int32), "in_all": jnp.zeros((), jnp.int32)},
        **({"ema": jax.tree.map(jnp.copy, drop_branch(params))} if average else {}),
    }


def exported_params(state: dict) -> dict:
    """What ships: the average where there is one, else the parameters."""
    return state.get("ema", state["params"])


# Of one branch each, a program per shape: what a program returns is copied, changed or not.
_refactored = jax.jit(refactor_tree, static_argnames="order")
_cut = jax.jit(cut_tree)


def _shrink(state: dict, rank: jax.Array, decay: RankDecay, moments: str) -> dict:
    """The state at a boundary; what does not change is passed on, not copied.

    Not one program that is given the state's memory: that one put moments where L and R lay, and
    on a GPU the next update was far off (docs/gpu.md).
    """
    params, opt = state["params"], state["opt"]
    if not decay.refactor:

        def cut(pair: dict) -> dict:
            return _cut(pair, rank)

        # Columns that live keep their basis, and so their moments, whatever `moments` asks.
        opt = opt if moments == "keep" else replace_branches(opt, cut)
        return {**state, "params": replace_branches(params, cut), "opt": opt}
    after = replace_branches(params, lambda pair: _refactored(pair, rank, decay.order))
    if moments == "reset":
        opt = zero_branch(opt)
    elif moments == "rotate":
        opt = rotate_moments(opt, params, after)
    return {**state, "params": after, "opt": opt}


def rotate_moments(opt: optax.OptState, before: dict, after: dict) -> optax.OptState:
    """Adam's moments of L and R in the basis that a refactoring went to.

    The first moment turns exactly like a gradient, the second as if its entries were independent:
    with the squares of the same matrix.
    """

    def turned(moments: dict, old: dict, new: dict, power: int) -> dict:
        if not isinstance(moments, dict):
            return moments
        out = {key: turned(moments[key], old[key], new[key], power) for key in moments}
        if "L" in out and "R" in out:
            layers = tuple(node[key] for node in (moments, old, new) for key in ("L", "R"))
            out["L"], out["R"] = _turn_layers(layers, power)
        return out

    def on_adam(part: optax.OptState) -> optax.OptState:
        if not isinstance(part, optax.ScaleByAdamState):
            return part
        return part._replace(
            mu=turned(part.mu, before, after, 1), nu=turned(part.nu, before, after, 2)
        )

    return jax.tree.map(on_adam, opt, is_leaf=lambda x: isinstance(x, optax.ScaleByAdamState))


@partial(jax.jit, static_argnames="power")
def _turn_layers(layers: tuple[jax.Array, ...], power: int) -> tuple[jax.Array, jax.Array]:
    def one(layer: tuple) -> tuple:
        left, right, *bases = layer
        for_left, for_right = change_of_basis(*bases)
        return left @ for_left**power, for_right**power @ right

    # Layer by layer, not by vmap: see `on_every_branch`.
    return one(layers) if layers[0].ndim == 2 else jax.lax.map(one, layers)


def enter_step(state: dict, step: int, decay: RankDecay, moments: str = "reset") -> dict:
    """What must happen before the update of `step`: refactor at a boundary, drop at rank 0.

    Args:
        state: the state after `step` updates.
        step: a Python int.
        decay: when each phase begins.
        moments: "reset" zeroes Adam's moments of L and R when they are refactored, "rotate" turns
            them into the new basis, "keep" leaves them as the release does. Without refactoring
            the first two zero those of the columns that die.
    """
    if not is_boundary(step, decay):
        return state
    rank = phase_rank(step, decay)
    if rank > 0:
        return _shrink(state, jnp.int32(rank), decay, moments)
    return {**state, "params": drop_branch(state["params"]), "opt": drop_branch(state["opt"])}


def has_branch(decay: RankDecay, step: int) -> bool:
    """Whether a state saved after `step` updates still holds L and R."""
    return phase_rank(max(step - 1, 0), decay) > 0
