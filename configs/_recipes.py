"""QVGen as released, and the trained baselines of its paper, as overrides of any model's config.

    python main.py --config configs/wan1_3b_w4a4.py:released --config.data.source=FOLDER
    python main.py --config configs/tiny_w4a4.py:full,efficient_dm

Every method is a few values of the one trainer; docs/baselines.md says how each differs from its
paper. Data, steps, batch, schedule and bits are the model's own, so that runs differ in the method.
"""

from typing import Any

from ml_collections import ConfigDict

# What EfficientDM's code gives the learned steps of activations (train_efficientdm.py), the one of
# these sources that trains them by AdamW. Its updates do not depend on a step's gradient: QVGen's
# rate of clips, which are in front of a sigmoid, would move a step by its own size.
_STEPS_RATE = {"train.learning_rate.clips": 5e-4}

# What our default has, and neither QVGen nor its baselines have.
_BARE = {"quant.rotation": "none", "quant.smoothing": 0.0}

# The authors' quantizers, branch, moments and schedule (ModelTC/QVGen, training/quant), mistakes
# included.
_RELEASED = {
    **_BARE,
    "method": "QVGen as released",
    "quant.behaviour": "released",
    "quant.branch_moments": "keep",
    "quant.branch_space": "weights",
    "quant.decay_fraction": 1.0,
}

# Training with quantizers as QVGen's, and nothing beside them (its ablation without Phi).
_PLAIN_QAT = {**_BARE, "method": "Plain QAT", "quant.rank": 0}

# Steps of weights and activations learned, both symmetric, on the task's own loss (LSQ, arXiv
# 1902.08153).
_LSQ = {
    **_BARE,
    "method": "LSQ",
    "quant.rank": 0,
    "quant.symmetric_weights": True,
    "quant.act_range": "learned",
    "quant.buckets": 1,
    "train.target": "truth",
    **_STEPS_RATE,
}

# LSQ with quantizers of activations that know the timestep, and the teacher's estimate to mimic
# (Q-DM, NeurIPS 2023).
_Q_DM = {
    **_BARE,
    "method": "Q-DM",
    "quant.rank": 0,
    "quant.symmetric_weights": True,
    "quant.act_range": "learned_zero",
    **_STEPS_RATE,
}

# A low-rank adapter merged into frozen weights before they are quantized, its rate in proportion to
# the layer's scale, and steps for each part of the timesteps (EfficientDM, arXiv 2310.03270; rank
# and rates from its quant_scripts/quant_layer.py and train_efficientdm.py).
_EFFICIENT_DM = {
    **_BARE,
    "method": "EfficientDM",
    "quant.rank": 32,
    "quant.branch_space": "merged",
    "quant.act_range": "learned_zero",
    "train.freeze_weights": True,
    "train.scale_aware": True,
    "train.log_spectrum": False,  # Of an adapter it says nothing.
    "train.learning_rate.branch": 1 / 2500,  # Times each layer's mean scale.
    "train.learning_rate.scales": 1e-6,
    **_STEPS_RATE,
}

RECIPES = {
    "released": _RELEASED,
    "plain_qat": _PLAIN_QAT,
    "lsq": _LSQ,
    "q_dm": _Q_DM,
    "efficient_dm": _EFFICIENT_DM,
}
"""Name to what it changes, dotted key to value; of a model whose weights train at `_USUAL_RATE`."""

_USUAL_RATE = 3e-5  # Of weights in QVGen's recipes.


def overrides(name: str, weights_rate: float) -> dict[str, Any]:
    """What a recipe changes in a model whose weights train at this rate, dotted key to value.

    Rates of adapter and scales are in units of weights and grow with it. Tried on the tiny Wan,
    whose own is 33 times the usual one: at W4A4, EfficientDM's loss at the last of 60 steps, same
    clips and noise, is 0.40 with the published rates, and 0.27 with 0.013 for the adapter and 2e-4
    for scales.
    """
    changes, factor = dict(RECIPES[name]), weights_rate / _USUAL_RATE
    for group in ("branch", "scales"):
        key = f"train.learning_rate.{group}"
        if key in changes:
            changes[key] *= factor
    return changes


def split(argument: str) -> tuple[str, str]:
    """A config's argument as (its own part, a recipe), either of them '': "full,lsq"."""
    parts = argument.split(",") if argument else []
    chosen = [part for part in parts if part in RECIPES]
    rest = [part for part in parts if part not in RECIPES]
    # Two recipes contradict each other: what is left over is refused as no argument.
    return ",".join(rest + chosen[1:]), "".join(chosen[:1])


def with_recipe(config: ConfigDict, name: str) -> ConfigDict:
    """The config as that recipe trains it; as it is if `name` is ''."""
    if name:
        config.update_from_flattened_dict(overrides(name, config.train.learning_rate.weights))
    return config
