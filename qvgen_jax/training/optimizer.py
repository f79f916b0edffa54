"""AdamW in four groups: weights, low-rank branch, weight scales, activation clips or steps.

Source: the recipe of the release (`script/train/*.sh`): one AdamW (0.9, 0.95), eps 1e-8, weight
decay on everything, one global norm clip, linear warm-up then cosine to zero, a rate per group.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

GROUPS = ("weights", "branch", "scales", "clips")
GROUP_OF_LEAF = {
    **dict.fromkeys(("L", "R"), "branch"),
    **dict.fromkeys(("scale", "zero_point"), "scales"),
    **dict.fromkeys(("lower", "upper", "act_scale", "act_zero_point"), "clips"),
}


def leaf_name(path: tuple) -> str:
    """The last key of a pytree path that ends in a dict."""
    return path[-1].key


def group_of(path: tuple, leaf: jax.Array) -> str:
    """The learning-rate group of a parameter, from its name.

    `scale` is also what norms call their weight; only the scale beside clips or steps is a
    quantizer's, which `labels` resolves.
    """
    del leaf
    return GROUP_OF_LEAF.get(leaf_name(path), "weights")


def labels(params: Mapping) -> dict:
    """A tree like `params` that names each leaf's group."""
    named = jax.tree_util.tree_map_with_path(group_of, params)

    def fix(node: dict) -> dict:
        if not isinstance(node, dict):
            return node
        out = {key: fix(child) for key, child in node.items()}
        quantizer = "lower" in out or "act_scale" in out
        if "scale" in out and not quantizer and isinstance(out["scale"], str):
            out["scale"] = "weights"
        return out

    return fix(named)


def split_frozen(params: Mapping, freeze_weights: bool) -> tuple[dict, dict]:
    """What trains, and what stays as it is: the group `weights`, if they are frozen.

    Gradients, moments and weight decay are of the first alone, so that the second costs its own
    bytes and no more. `joined` undoes it.
    """
    if not freeze_weights:
        return dict(params), {}
    named = labels(params)
    trained = _only(params, named, lambda group: group != "weights")
    return trained, _only(params, named, lambda group: group == "weights")


def _only(params: Mapping, named: Mapping, wanted: Callable[[str], bool]) -> dict:
    """The leaves of wanted groups, without dicts that would be empty."""
    out = {}
    for key, group in named.items():
        if isinstance(group, dict):
            if inner := _only(params[key], group, wanted):
                out[key] = inner
        elif wanted(group):
            out[key] = params[key]
    return out


def joined(trained: Mapping, frozen: Mapping) -> dict:
    """One tree of two that share no leaf."""
    both = {**trained, **frozen}
    shared = trained.keys() & frozen.keys()
    return both | {key: joined(trained[key], frozen[key]) for key in shared}


def group_norms(squares: jax.Array, params: dict) -> dict[str, jax.Array]:
    """The gradient's norm by group: `grad_norm_weights` and so on, of those that have parameters.

    Args:
        squares: `[leaves]`, the sum of squares of each array of the gradient, before clipping.
        params: what the gradient is of.
    """
    of_leaf = jax.tree.leaves(labels(params))
    places = {group: [i for i, name in enumerate(of_leaf) if name == group] for group in GROUPS}
    return {
        f"grad_norm_{group}": jnp.sqrt(jnp.sum(squares[np.asarray(rows)]))
        for group, rows in places.items()
        if rows
    }


def learning_rates(train: Mapping, tail: int = 0) -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Each group's rate as a function of step.

    Args:
        train: the `train` section of the config. Its `schedule` is a linear warm-up and then
            `cosine`: to zero at `train.steps`, or `constant_tail`: level from step `tail` on, so
            that the pure low-bit model still trains. `tail_rate` 0 keeps that cosine's own value
            at `tail`; a positive one is the share of the peak that a cosine reaches there.
        tail: the step where the tail begins; never within the warm-up.
    """
    level, ending = train["schedule"] == "constant_tail", train["tail_rate"]
    tail = max(tail, train["warmup_steps"] + 1)

    def rate(peak: float) -> Callable[[jax.Array], jax.Array]:
        cosine = optax.warmup_cosine_decay_schedule(
            init_value=0.0,
            peak_value=peak,
            warmup_steps=train["warmup_steps"],
            decay_steps=tail if level and ending else train["steps"],
            end_value=peak * ending if level else 0.0,
        )
        return (lambda step: cosine(jnp.minimum(step, tail))) if level else cosine

    return {group: rate(train["learning_rate"][group]) for group in GROUPS}


def make_optimizer(train: Mapping, tail: int = 0) -> optax.GradientTransformation:
    """The whole update rule; its state is a tree that mirrors the parameters that train.

    Args:
        train, tail: see `learning_rates`; with `scale_aware`, see `scale_branch_updates`.
    """
    rates = learning_rates(train, tail)
    scales = {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}
    return optax.chain(
        optax.clip_by_global_norm(train["clip_norm"]),
        optax.scale_by_adam(b1=train["beta1"], b2=train["beta2"], eps=train["epsilon"]),
        optax.add_decayed_weights(train["weight_decay"]),
        *([optax.stateless(scale_branch_updates)] if train.get("scale_aware") else []),
        optax.partition(scales, labels),
    )


def scale_branch_updates(updates: dict, params: dict) -> dict:
    """Updates of every L and R times their layer's weight scale, averaged over its channels.

    A weight changes its code once an adapter has moved it by a step of the weight's own size
    (EfficientDM, arXiv 2310.03270, eq. 8, which multiplies gradients; under Adam that must be the
    learning rate, as in its train_efficientdm.py: `lr = mean(delta) / 2500`). There the scales are
    those of step 0; here they are the present ones.
    """
    if not isinstance(updates, dict):
        return updates
    scaled = {name: scale_branch_updates(node, params[name]) for name, node in updates.items()}
    if "L" in scaled and "R" in scaled:
        size = jnp.mean(params["scale"], axis=-1)[..., None, None]
        scaled |= {name: scaled[name] * size for name in "LR"}
    return scaled


def keep_scales_positive(params: dict, before: dict) -> dict:
    """An update in which no quantizer's scale or step falls below half of what it was.

    Adam moves a scale by its rate, whatever its size: a small one would soon be below zero, where
    codes mean nothing and no gradient leads back.

    Args:
        params: after the update.
        before: the same parameters before it.
    """

    def keep(path: tuple, new: jax.Array, old: jax.Array, group: str) -> jax.Array:
        name = leaf_name(path)
        is_scale = (group == "scales" and name == "scale") or name == "act_scale"
        return jnp.maximum(new, old / 2) if is_scale else new

    return jax.tree_util.tree_map_with_path(keep, params, before, labels(params))
