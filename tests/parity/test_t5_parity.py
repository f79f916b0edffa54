"""Our T5 and UMT5 encoders against transformers' on the same random weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from convert.load import read_text_encoder
from convert.names import from_torch, to_torch
from convert.t5 import Untied, name_table
from qvgen_jax.text.t5 import T5Config, T5Encoder, relative_position_buckets
from tests.parity.table import hold

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
KINDS = {
    "t5": (transformers.T5EncoderModel, transformers.T5Config),
    "umt5": (transformers.UMT5EncoderModel, transformers.UMT5Config),
}


def torch_model(kind: str, fields: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model, config = KINDS[kind]
    model = model(config(**fields, feed_forward_proj="gated-gelu")).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "relative" in name:  # The initial 1 and ~0 would hide mistakes.
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def numpy_state(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in model.state_dict().items()}


def run(config: T5Config, params: dict, ids, mask, dtype=jnp.float32) -> np.ndarray:
    graph = nnx.graphdef(
        nnx.eval_shape(lambda: T5Encoder(config, key=jax.random.key(0), dtype=dtype))
    )
    with jax.default_matmul_precision("highest"):
        forward = jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask))
        return np.asarray(forward(params, ids, mask), np.float32)


def tokens(vocabulary: int, lengths: list[int], padded: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.random.default_rng(1).integers(3, vocabulary, (len(lengths), padded))
    mask = (np.arange(padded)[None] < np.array(lengths)[:, None]).astype(np.int32)
    return np.where(mask, ids, 0).astype(np.int32), mask


def torch_run(model, ids, mask) -> np.ndarray:
    with torch.no_grad():
        mask = None if mask is None else torch.from_numpy(mask)
        return model(torch.from_numpy(ids), mask).last_hidden_state.float().numpy()


def compare(kind: str, fields: dict, lengths: list[int], padded: int, masked=True) -> float:
    reference = torch_model(kind, fields)
    config = T5Config.from_json(reference.config.to_dict())
    ids, mask = tokens(config.vocab_size, lengths, padded)
    expected = torch_run(reference, ids, mask if masked else None)
    params = from_torch(name_table(config), Untied(numpy_state(reference)))
    got = run(config, params, ids, mask if masked else np.ones_like(mask))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lengths", "padded"),
    [([1], 1), ([7, 1, 12], 12), ([5, 300], 300)],  # 300: beyond the largest distance bucket
)
def test_the_embeddings_equal_transformers(kind, lengths, padded):
    error = compare(kind, TINY, lengths, padded)
    hold("Text encoder", f"{kind}, odd lengths", error)


@pytest.mark.parametrize("padded", [5, 226])
def test_attended_padding_equals_t5_without_a_mask(padded):
    error = compare("t5", TINY, [3, 1], padded, masked=False)
    hold("Text encoder", "t5, padding attended", error)


@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_as_wide_as_the_real_heads_equals_transformers(kind):
    fields = {"vocab_size": 300, "d_model": 512, "d_kv": 64, "num_heads": 8, "d_ff": 1280}
    error = compare(kind, fields | {"num_layers": 1}, [9, 30], 32)
    hold("Text encoder", f"{kind}, one layer 512 wide", error)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_as_near_to_float32_as_pytorchs_own(kind):
    fields = TINY | {"d_model": 192, "num_heads": 5, "d_ff": 333}
    reference = torch_model(kind, fields)
    config = T5Config.from_json(reference.config.to_dict())
    ids, mask = tokens(config.vocab_size, [17, 17], 17)
    params = from_torch(name_table(config), Untied(numpy_state(reference)))
    exact = torch_run(reference, ids, mask)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    ours = np.linalg.norm(run(config, params, ids, mask, jnp.bfloat16) - exact)
    theirs = np.linalg.norm(torch_run(reference.to(torch.bfloat16), ids, mask) - exact)
    # Their norms and softmax round to bfloat16 too, ours do not; both are about 1 %.
    assert ours <= 1.1 * theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_layer_of_the_real_size_equals_transformers_and_int8_is_near(kind, tmp_path):
    """4096 wide, 64 heads, 193 M parameters; 4 GB and a minute. int8: 1.5 % of the norm.

    python -m pytest tests/parity/test_t5_parity.py -m slow
    """
    fields = {"vocab_size": 300, "d_model": 4096, "d_kv": 64, "num_heads": 64, "d_ff": 10240}
    reference = torch_model(kind, fields | {"num_layers": 1})
    reference.save_pretrained(tmp_path)
    ids, mask = tokens(300, [77, 5], 77)
    expected = torch_run(reference, ids, mask) * mask[..., None]
    del reference
    for weights, tolerance in (("float", 1e-4), ("int8", 0.03)):
        with jax.default_matmul_precision("highest"):
            got = np.asarray(read_text_encoder(tmp_path, jnp.float32, weights)(ids, mask))
        error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
        print(f"{kind} {weights}: {error:.2e} of the norm")
        assert error < tolerance
        if weights == "float":
            largest = np.abs(got - expected).max() / np.abs(expected).max()
            hold("Text encoder", f"{kind}, one layer at the real dimensions", largest)


def test_every_distance_falls_into_transformers_bucket():
    reference = torch_model("umt5", TINY).encoder.block[0].layer[0].SelfAttention
    distance = torch.arange(512)[None, :] - torch.arange(512)[:, None]
    expected = reference._relative_position_bucket(distance).numpy()
    np.testing.assert_array_equal(relative_position_buckets(512, 32, 128), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_folder_holds_the_tensors_of_the_table(kind, tmp_path):
    torch_model(kind, TINY).save_pretrained(tmp_path)
    state = Untied(load_file(tmp_path / "model.safetensors"))
    table = name_table(T5Config(**TINY, model_type=kind))
    back = to_torch(table, from_torch(table, state))
    assert back.keys() == state.keys()
    assert all(np.array_equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("dropped", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_is_found_under_either_of_its_names(dropped):
    state = numpy_state(torch_model("umt5", TINY))
    embedding = state["shared.weight"]
    del state[dropped]
    np.testing.assert_array_equal(Untied(state)["shared.weight"], embedding)
