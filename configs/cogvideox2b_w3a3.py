"""QVGen W3A3 on CogVideoX-2B: `cogvideox2b_w4a4` with three bits, as in the paper.

    python main.py --config configs/cogvideox2b_w3a3.py --config.data.source=FOLDER

Hardware: see `cogvideox2b_w4a4`. Not run here. Expected (paper, VBench): imaging 58.36 (BF16
59.15), dynamic 53.89 (67.78), scene 23.85 (36.24).
"""

from ml_collections import ConfigDict

from configs import cogvideox2b_w4a4


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: as in `cogvideox2b_w4a4`."""
    config = cogvideox2b_w4a4.get_config(arg)
    config.quant.weight_bits = 3
    config.quant.act_bits = 3
    return config
