"""QVGen W3A3 on CogVideoX1.5-5B: `cogvideox1_5_5b_w4a4` with three bits, as in the paper.

    python main.py --config configs/cogvideox1_5_5b_w3a3.py --config.data.source=FOLDER

Hardware: see `cogvideox1_5_5b_w4a4`. Not run here; we know no published W3A3 figures of this model.
"""

from ml_collections import ConfigDict

from configs import cogvideox1_5_5b_w4a4


def get_config(arg: str = "") -> ConfigDict:
    """`arg`: as in `cogvideox1_5_5b_w4a4`."""
    config = cogvideox1_5_5b_w4a4.get_config(arg)
    config.quant.weight_bits = 3
    config.quant.act_bits = 3
    return config
