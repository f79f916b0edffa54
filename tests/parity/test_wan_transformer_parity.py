"""Our Wan transformer against diffusers' on the same random weights."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch, to_torch
from convert.wan_transformer import name_table
from qvgen_jax.models.wan import WanConfig, WanTransformer
from tests.parity.table import hold

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONFIGS = Path(__file__).parent.parent / "models/configs"
TINY = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 3,
    "attention_head_dim": 32,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 112,
    "num_layers": 3,
}


def torch_model(fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**fields).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or ".norm" in name:  # The initial 0 and 1 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.float().numpy() for name, value in model.state_dict().items()}


def random_inputs(shape: tuple[int, ...], text_tokens: int, text_dim: int) -> tuple:
    rng = np.random.default_rng(1)
    latents = rng.standard_normal(shape).astype(np.float32)
    text = rng.standard_normal((shape[0], text_tokens, text_dim)).astype(np.float32)
    return latents, np.linspace(1000, 7, shape[0]).round().astype(np.float32), text


def run_torch(model: torch.nn.Module, latents, timesteps, text) -> np.ndarray:
    dtype = model.patch_embedding.weight.dtype
    with torch.no_grad():
        velocity = model(
            torch.from_numpy(latents.transpose(0, 4, 1, 2, 3)).to(dtype),
            torch.from_numpy(timesteps),
            torch.from_numpy(text).to(dtype),
            return_dict=False,
        )[0]
    return velocity.float().numpy().transpose(0, 2, 3, 4, 1)


def run_ours(config: WanConfig, params: dict, inputs: tuple, dtype=jnp.float32):
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: WanTransformer(config, key=jax.random.key(0), dtype=dtype))
    )
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, *x: nnx.merge(graph, params)(*x))(params, *inputs)


def compare(fields: dict, latents_shape: tuple[int, ...], text_tokens: int) -> float:
    reference = torch_model(fields)
    config = WanConfig.from_json(dict(reference.config))
    inputs = random_inputs(latents_shape, text_tokens, config.text_dim)
    expected = run_torch(reference, *inputs)
    params = from_torch(name_table(config), numpy_state(reference))
    del reference  # Two copies of a large model are enough.
    got = run_ours(config, params, inputs)
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def real_fields(model: str) -> dict:
    fields = json.loads((CONFIGS / f"{model}.json").read_text())
    del fields["_class_name"]
    return fields


@pytest.mark.parametrize(
    ("latents_shape", "text_tokens"),
    [
        ((1, 1, 2, 2, 16), 1),  # one frame, one patch, one word
        ((3, 5, 6, 10, 16), 7),
        ((2, 2, 14, 4, 16), 13),
    ],
)
def test_the_velocity_equals_diffusers(latents_shape, text_tokens):
    error = compare(TINY, latents_shape, text_tokens)
    hold("Wan transformer", "random, odd sizes", error)


def test_a_temporal_patch_and_another_head_split_equal_diffusers():
    fields = TINY | {"patch_size": [2, 2, 2], "attention_head_dim": 40, "in_channels": 4}
    error = compare(fields | {"out_channels": 4}, (2, 4, 4, 6, 4), 5)
    hold("Wan transformer", "random, odd sizes", error)


@pytest.mark.parametrize("model", ["Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B"])
def test_one_layer_at_the_real_dimensions_equals_diffusers(model):
    fields = real_fields(model) | {"num_layers": 1}
    error = compare(fields, (1, 3, 6, 10, 16), 9)
    hold("Wan transformer", f"{model}, one layer at its real dimensions", error)


@pytest.mark.slow
def test_the_whole_1_3b_equals_diffusers():
    """1.4 billion random weights; 12 GB of memory, minutes.

    python -m pytest tests/parity/test_wan_transformer_parity.py -m slow
    """
    error = compare(real_fields("Wan2.1-T2V-1.3B"), (1, 2, 6, 10, 16), 9)
    hold("Wan transformer", "Wan2.1-T2V-1.3B, whole", error)


def test_bfloat16_is_as_near_to_float32_as_pytorchs(tmp_path):
    """Root mean square error against PyTorch in float32: ours is 0.8 of PyTorch's, at most 1."""
    reference = torch_model(TINY | {"num_layers": 6})
    config = WanConfig.from_json(dict(reference.config))
    inputs = random_inputs((3, 3, 8, 12, 16), 11, config.text_dim)
    expected = run_torch(reference, *inputs)
    reference.save_pretrained(tmp_path)  # from_pretrained knows what PyTorch keeps in float32.
    half = type(reference).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf,
        from_torch(name_table(config), numpy_state(reference)),
    )

    def error(got) -> float:
        return float(np.sqrt(np.square(got - expected).mean() / np.square(expected).mean()))

    ours = error(run_ours(config, params, inputs, jnp.bfloat16))
    assert 0 < ours <= error(run_torch(half, *inputs))


def test_converting_there_and_back_keeps_every_tensor():
    state = numpy_state(torch_model(TINY))
    table = name_table(WanConfig.from_json(TINY))
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
