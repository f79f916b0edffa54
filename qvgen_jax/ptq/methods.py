"""The published methods as rows of choices, and what a config changes of them.

| method      | smoothing        | rotation | branch | range  | rounding | source           |
|-------------|------------------|----------|--------|--------|----------|------------------|
| rtn         | none             | none     | none   | minmax | nearest  |                  |
| rtn_search  | none             | none     | none   | search | nearest  | QVGen's step 0   |
| smoothquant | fixed, 0.5       | none     | none   | minmax | nearest  | arXiv 2211.10438 |
| gptq        | none             | none     | none   | search | gptq     | arXiv 2210.17323 |
| vidit_q     | fixed, 0.5       | hadamard | none   | minmax | nearest  | arXiv 2406.02540 |
| svdquant    | searched, by layer | none   | rank   | search | nearest  | arXiv 2411.05007 |
"""

import dataclasses
from collections.abc import Mapping

from qvgen_jax.errors import UserError
from qvgen_jax.quant.config import SEARCHED, QuantConfig
from qvgen_jax.quant.untrained import Choices

METHODS = {
    "rtn": Choices(),
    "rtn_search": Choices(range="search"),
    "smoothquant": Choices(smoothing="fixed"),
    "gptq": Choices(range="search", rounding="gptq"),
    "vidit_q": Choices(smoothing="fixed", rotation="hadamard"),
    "svdquant": Choices(smoothing="searched", rank=32, range="search"),
}


def choices_of(method: str, config: Mapping) -> Choices:
    """A method's row with what `config.calibration` says otherwise.

    Args:
        method: one of `METHODS`.
        config: reads `calibration` and `quant.symmetric_weights`.

    Raises:
        UserError: there is no such method.
    """
    if method not in METHODS:
        raise UserError(f"--method={method}; expected one of {', '.join(METHODS)}")
    row, given = METHODS[method], config["calibration"]
    changes = {
        "points": given["smoothing_points"],
        "iterations": given["branch_iterations"],
        "damping": given["damping"],
        "by_activity": given["by_activity"],
        "symmetric": config["quant"]["symmetric_weights"],
    }
    if given["rounding"]:
        changes["rounding"] = given["rounding"]
    if given["exponent"]:
        changes["exponent"] = given["exponent"]
    if row.rank:
        changes["rank"] = given["rank"]
    return row._replace(**changes)


def quantization(quant: QuantConfig, choices: Choices) -> QuantConfig:
    """What an export of these choices says of itself.

    Args:
        quant: of the config: bits, layers in full precision, symmetric weights, the time table.
        choices: of the method.
    """
    smoothing = {"none": 0.0, "fixed": choices.exponent, "searched": SEARCHED}
    return dataclasses.replace(
        quant,
        rank=choices.rank,
        branch_input="tokens" if choices.rank else "codes",
        smoothing=smoothing[choices.smoothing],
        rotation=choices.rotation,
        # Every linear smooths and rotates what it reads: a factor is found when its linear is.
        folded={},
        # Tokens keep their whole range: one pair of clips, wide open, for all timesteps.
        buckets=1,
        clip_index="bucket",
        single_clip=(),
    )
