"""The plans of all shipped configs, as text: `python -m tests.golden.plans` writes them anew."""

from pathlib import Path

from configs import read_config
from qvgen_jax.plan.job import run_plan

FOLDER = Path(__file__).with_name("plans")
TARGETS = {
    "wan14b_w4a4": "v5p:4x4x4",
    "wan14b_w3a3": "v6e:16x16",
    "wan1_3b_w4a4": "v5e:8x8",
    "wan1_3b_w3a3": "h200:8",
    "cogvideox2b_w4a4": "v5e:16x16",
    "cogvideox2b_w3a3": "rtx4090:1",
    "cogvideox1_5_5b_w4a4": "tpu7x:4x4x4",
    "cogvideox1_5_5b_w3a3": "h100:32",
}
"""Of each config the chips that it is planned for: every kind, those too small among them."""


def planned(name: str) -> str:
    """The report of a config, estimated."""
    config = read_config(f"configs/{name}.py").to_dict()
    return run_plan(config, TARGETS[name], compiler=False) + "\n"


if __name__ == "__main__":
    for each in TARGETS:
        (FOLDER / f"{each}.txt").write_text(planned(each))
