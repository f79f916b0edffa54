"""The released names over diffusers' own module tree at real size; nothing is allocated."""

import json
from pathlib import Path

import pytest

from convert.released_names import plan_released
from convert.safetensors_file import TensorInfo
from qvgen_jax.models import config_from_json

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = Path(__file__).parents[1] / "models" / "configs"
BUCKETS, RANK = 50, 32


def released_headers(model: torch.nn.Module) -> dict[str, TensorInfo]:
    """What is in a checkpoint once every linear of the model is the release's."""
    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    shapes = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in linears
    }
    for name, linear in linears.items():
        fan_out, fan_in = linear.weight.shape
        shapes |= {
            f"{name}.w": (fan_out, fan_in),
            f"{name}.wquantizer.scale": (fan_out, 1),
            f"{name}.wquantizer.zero_point": (fan_out, 1),
            f"{name}.wquantizer.L": (fan_out, RANK),
            f"{name}.wquantizer.R": (RANK, fan_in),
            f"{name}.aquantizer.upper": (BUCKETS,),
            f"{name}.aquantizer.lower": (BUCKETS,),
        }
        if linear.bias is not None:
            shapes[f"{name}.b"] = (fan_out,)
    return {n: TensorInfo(Path("x"), n, "BF16", shape, 0, 0) for n, shape in shapes.items()}


@pytest.mark.parametrize(("name", "count"), [("Wan2.1-T2V-1.3B", 306), ("CogVideoX-2B", 245)])
def test_every_tensor_of_the_released_model_has_its_place(name, count):
    fields = json.loads((CONFIGS / f"{name}.json").read_text())
    config = config_from_json(fields)
    with torch.device("meta"):
        model = getattr(diffusers, fields["_class_name"]).from_config(fields)
    plan = plan_released(config, released_headers(model))
    assert sum(map(len, plan.quantized.values())) == count
    assert (plan.rank, plan.full_precision) == (RANK, ())
