"""How many multiply-adds a run takes, for comparisons at equal cost.

Without the low-rank branch a step is cheaper, so that more of them fit.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.errors import UserError
from qvgen_jax.models import config_from_json, quantizable
from qvgen_jax.models.linears import video_tokens
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.training.loop import rank_decay
from qvgen_jax.training.operations import forward_products, step_work
from qvgen_jax.training.student import quant_config

EQUAL_OPERATIONS = "equal_operations"
"""What a grid writes for `train.steps`: as many as cost what the default costs."""


def forward_operations(model: WanConfig, tokens: int, text_tokens: int) -> int:
    """Multiply-adds of one sample's forward in full precision."""
    return sum(product.count for product in forward_products(model, tokens, text_tokens))


def step_operations(
    model: WanConfig,
    tokens: int,
    text_tokens: int,
    rank: int,
    batch_size: int,
    remat: str,
    quantized: Collection[str],
    teacher: bool = True,
) -> int:
    """Multiply-adds of a training step; arguments of `qvgen_jax.training.operations.step_work`."""
    work = step_work(model, tokens, text_tokens, rank, remat, quantized, teacher=teacher)
    return batch_size * sum(work.values())


def run_operations(config: Mapping) -> tuple[int, int]:
    """Multiply-adds of a whole run, and of one of its steps without a branch.

    Args:
        config: of the run; its model is a local folder of a Wan pipeline.

    Raises:
        UserError: the model is of another family, or its config files are not there.
    """
    model, (tokens, text_tokens) = _model(config), _tokens(config)
    train, quant = config["train"], quant_config(config["quant"], model)
    shape = (model, tokens, text_tokens)
    # Layers in full precision, such as those of a time table, have no branch.
    names = quant.quantized(quantizable(model))
    rest = (train["batch_size"], train["remat"], names, train["target"] == "teacher")
    with_branch = step_operations(*shape, quant.token_rank, *rest)
    without = step_operations(*shape, 0, *rest)
    end = min(rank_decay(config).end, train["steps"])
    return end * with_branch + (train["steps"] - end) * without, without


def equal_steps(config: Mapping, like: Mapping) -> int:
    """Steps of a run without a branch, `config`, that take the operations of the whole of `like`.

    Raises:
        UserError: `config` has a branch, whose length would depend on the answer.
    """
    if config["quant"]["rank"]:
        raise UserError(
            f"train.steps={EQUAL_OPERATIONS!r} is for runs without a branch; quant.rank is "
            f"{config['quant']['rank']}, set it to 0"
        )
    return round(run_operations(like)[0] / run_operations(config)[1])


def _json(config: Mapping, part: str) -> dict:
    path = Path(config["model"]) / part / "config.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; operations are counted for a local Wan pipeline")
    return json.loads(path.read_text())


def _model(config: Mapping) -> WanConfig:
    model = config_from_json(_json(config, "transformer"))
    if not isinstance(model, WanConfig):
        raise UserError(f"{config['model']} is no Wan pipeline; operations are counted for those")
    return model


def _tokens(config: Mapping) -> tuple[int, int]:
    """Of one sample's video and of its prompt."""
    data = config["data"]
    vae = WanVAEConfig.from_json(_json(config, "vae"))
    factors = vae.temporal_factor, vae.spatial_factor
    size = data["num_frames"], data["height"], data["width"]
    return video_tokens(_model(config), *size, factors), data["max_length"]
