"""The released names over diffusers' own module tree at real size; nothing is allocated."""

from pathlib import Path

import pytest

from convert.released_names import plan_released
from convert.safetensors_file import TensorInfo
from convert.tables import config_from_json

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

WAN_1_3B = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}
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


@pytest.mark.parametrize(("kind", "fields", "count"), [("WanTransformer3DModel", WAN_1_3B, 306)])
def test_every_tensor_of_the_released_model_has_its_place(kind, fields, count):
    with torch.device("meta"):
        model = getattr(diffusers, kind)(**fields)
    config = config_from_json({"_class_name": kind, **dict(model.config)})
    plan = plan_released(config, released_headers(model))
    assert sum(map(len, plan.quantized.values())) == count
    assert (plan.rank, plan.full_precision) == (RANK, ())
