"""Our Wan transformer against diffusers' on the same random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch, to_torch
from convert.wan_transformer import name_table
from qvgen_jax.models.wan import WanConfig, WanTransformer

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

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
    return {name: value.numpy() for name, value in model.state_dict().items()}


def compare(fields: dict, latents_shape: tuple[int, ...], text_tokens: int) -> float:
    reference = torch_model(fields)
    config = WanConfig.from_json(dict(reference.config))
    batch = latents_shape[0]
    rng = np.random.default_rng(1)
    latents = rng.standard_normal(latents_shape).astype(np.float32)
    text = rng.standard_normal((batch, text_tokens, config.text_dim)).astype(np.float32)
    timesteps = np.linspace(1000, 7, batch).round().astype(np.float32)
    with torch.no_grad():
        expected = reference(
            torch.from_numpy(latents.transpose(0, 4, 1, 2, 3)),
            torch.from_numpy(timesteps),
            torch.from_numpy(text),
            return_dict=False,
        )[0]
    expected = expected.numpy().transpose(0, 2, 3, 4, 1)

    graph = nnx.graphdef(nnx.eval_shape(lambda: WanTransformer(config, key=jax.random.key(0))))
    params = from_torch(name_table(config), numpy_state(reference))
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params, *inputs: nnx.merge(graph, params)(*inputs))
        got = forward(params, jnp.asarray(latents), jnp.asarray(timesteps), jnp.asarray(text))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("latents_shape", "text_tokens"),
    [
        ((1, 1, 2, 2, 16), 1),  # one frame, one patch, one word
        ((3, 5, 6, 10, 16), 7),
        ((2, 2, 14, 4, 16), 13),
    ],
)
def test_the_velocity_equals_diffusers(latents_shape, text_tokens):
    assert compare(TINY, latents_shape, text_tokens) < 1e-4


def test_a_temporal_patch_and_another_head_split_equal_diffusers():
    fields = TINY | {"patch_size": [2, 2, 2], "attention_head_dim": 40, "in_channels": 4}
    assert compare(fields | {"out_channels": 4}, (2, 4, 4, 6, 4), 5) < 1e-4


def test_one_layer_of_the_real_size_equals_diffusers():
    fields = {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 1}
    assert compare(fields, (1, 3, 6, 10, 16), 9) < 1e-4


def test_converting_there_and_back_keeps_every_tensor():
    state = numpy_state(torch_model(TINY))
    table = name_table(WanConfig.from_json(TINY))
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)
