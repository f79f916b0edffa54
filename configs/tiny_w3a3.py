"""QVGen W3A3 on the embedded tiny Wan pipeline: `tiny_w4a4` with three bits.

    python main.py --config configs/tiny_w3a3.py          # demo-sized, minutes on 2 CPU cores
    python main.py --config configs/tiny_w3a3.py:full     # the figures in the README

`full` needs the data set of `tiny_w4a4`'s docstring.
"""

from ml_collections import ConfigDict

from configs import tiny_w4a4


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: as in `tiny_w4a4`."""
    config = tiny_w4a4.get_config(arg)
    config.quant.weight_bits = 3
    config.quant.act_bits = 3
    if "full" in arg.split(","):
        config.train.steps = 3000
        config.train.warmup_steps = 150
    return config
