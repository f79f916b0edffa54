"""Folders that diffusers saves, through our arrays and back into diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from convert.load import read_transformer  # noqa: E402
from convert.names import to_torch  # noqa: E402
from convert.save import MODEL_INDEX, write_json  # noqa: E402
from convert.tables import table_for  # noqa: E402
from convert.to_arrays import import_pipeline  # noqa: E402
from convert.to_safetensors import export_safetensors  # noqa: E402
from convert.verify import verify  # noqa: E402
from tests.golden.tiny_models import WAN_SAVED  # noqa: E402


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_diffusers_loads_from_the_export_what_it_saved(tmp_path, dtype):
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**WAN_SAVED | {"num_layers": 3}).to(dtype)
    source = tmp_path / "source"
    model.save_pretrained(source / "transformer", max_shard_size="40KB")
    write_json(source / "model_index.json", MODEL_INDEX)
    assert len(list((source / "transformer").glob("*.safetensors"))) >= 2

    import_pipeline(source, tmp_path / "imported")
    export_safetensors(tmp_path / "imported", tmp_path / "back")
    assert verify(source, tmp_path / "imported")["equal"]
    assert verify(source, tmp_path / "back")["equal"]

    def load(folder):
        path = folder / "transformer"
        return diffusers.WanTransformer3DModel.from_pretrained(path, torch_dtype=dtype).state_dict()

    saved, got = load(source), load(tmp_path / "back")
    assert got.keys() == saved.keys() == model.state_dict().keys()
    assert all(torch.equal(got[name], saved[name]) for name in saved)

    ours = read_transformer(tmp_path / "imported" / "transformer", jnp.float32)
    tensors = to_torch(table_for(ours.config), ours.states[0])
    assert all(np.array_equal(tensors[name], saved[name].float().numpy()) for name in saved)
