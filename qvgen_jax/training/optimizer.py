"""AdamW in four groups: weights, low-rank branch, weight scales, activation clips.

Source: the recipe of the release (`script/train/*.sh`): one AdamW (0.9, 0.95), eps 1e-8, weight
decay on everything, one global norm clip, linear warm-up then cosine to zero, a rate per group.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax

GROUP_OF_LEAF = {"L": "branch", "R": "branch", "scale": "scales", "zero_point": "scales"}
GROUPS = ("weights", "branch", "scales", "clips")


def leaf_name(path: tuple) -> str:
    """The last key of a pytree path that ends in a dict."""
    return path[-1].key


def group_of(path: tuple, leaf: jax.Array) -> str:
    """The learning-rate group of a parameter, from its name.

    `scale` is also what norms call their weight; only the scale beside clips is a quantizer's,
    which `labels` resolves.
    """
    del leaf
    name = leaf_name(path)
    return "clips" if name in ("lower", "upper") else GROUP_OF_LEAF.get(name, "weights")


def labels(params: Mapping) -> dict:
    """A tree like `params` that names each leaf's group."""
    named = jax.tree_util.tree_map_with_path(group_of, params)

    def fix(node: dict) -> dict:
        if not isinstance(node, dict):
            return node
        out = {key: fix(child) for key, child in node.items()}
        if "scale" in out and "lower" not in out and isinstance(out["scale"], str):
            out["scale"] = "weights"
        return out

    return fix(named)


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
    """The whole update rule; its state is a tree that mirrors the parameters."""
    rates = learning_rates(train, tail)
    scales = {group: optax.scale_by_learning_rate(rate) for group, rate in rates.items()}
    return optax.chain(
        optax.clip_by_global_norm(train["clip_norm"]),
        optax.scale_by_adam(b1=train["beta1"], b2=train["beta2"], eps=train["epsilon"]),
        optax.add_decayed_weights(train["weight_decay"]),
        optax.partition(scales, labels),
    )


def keep_scales_positive(params: dict, before: dict) -> dict:
    """An update in which no quantizer's scale falls below half of what it was.

    Adam moves a scale by its rate, whatever its size: a small one would soon be below zero, where
    codes mean nothing and no gradient leads back.

    Args:
        params: after the update.
        before: the same parameters before it.
    """

    def keep(path: tuple, new: jax.Array, old: jax.Array, group: str) -> jax.Array:
        is_scale = group == "scales" and leaf_name(path) == "scale"
        return jnp.maximum(new, old / 2) if is_scale else new

    return jax.tree_util.tree_map_with_path(keep, params, before, labels(params))
