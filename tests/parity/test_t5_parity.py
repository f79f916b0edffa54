"""Our UMT5 encoder against transformers' on the same random weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert.names import from_torch, to_torch
from convert.umt5 import name_table, untie
from qvgen_jax.text.umt5 import UMT5Config, UMT5Encoder, relative_position_buckets

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 61,
    "d_model": 24,
    "d_kv": 16,
    "num_heads": 3,
    "d_ff": 40,
    "num_layers": 3,
    "relative_attention_num_buckets": 32,
    "relative_attention_max_distance": 128,
}


def torch_model(fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.UMT5EncoderModel(transformers.UMT5Config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "relative" in name:  # The initial 1 and ~0 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def compare(fields: dict, lengths: list[int], padded: int) -> float:
    reference = torch_model(fields)
    config = UMT5Config.from_json(reference.config.to_dict())
    rng = np.random.default_rng(1)
    ids = rng.integers(3, config.vocab_size, (len(lengths), padded)).astype(np.int32)
    mask = (np.arange(padded)[None] < np.array(lengths)[:, None]).astype(np.int32)
    ids = np.where(mask, ids, 0)
    with torch.no_grad():
        expected = reference(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state
    expected = expected.numpy()

    graph = nnx.graphdef(nnx.eval_shape(lambda: UMT5Encoder(config, key=jax.random.key(0))))
    params = from_torch(name_table(config), untie(numpy_state(reference)))
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask))
        got = forward(params, jnp.asarray(ids), jnp.asarray(mask))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize(
    ("lengths", "padded"),
    [([1], 1), ([7, 1, 12], 12), ([5, 300], 300)],  # 300: beyond the largest distance bucket
)
def test_the_embeddings_equal_transformers(lengths, padded):
    assert compare(TINY, lengths, padded) < 1e-4


def test_one_layer_as_wide_as_the_real_heads_equals_transformers():
    fields = {"vocab_size": 300, "d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1280}
    assert compare(fields | {"num_layers": 1}, [9, 30], 32) < 1e-4


def test_every_distance_falls_into_transformers_bucket():
    reference = torch_model(TINY).encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = reference._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(relative_position_buckets(512, 32, 128), expected)


def test_a_saved_folder_holds_the_tensors_of_the_table(tmp_path):
    model = torch_model(TINY)
    model.save_pretrained(tmp_path)
    state = untie(load_file(tmp_path / "model.safetensors"))
    table = name_table(UMT5Config.from_json(TINY))
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("dropped", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_is_found_under_either_of_its_names(dropped):
    state = numpy_state(torch_model(TINY))
    embedding = state["shared.weight"]
    del state[dropped]
    np.testing.assert_array_equal(untie(state)["shared.weight"], embedding)
