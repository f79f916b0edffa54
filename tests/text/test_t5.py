"""The UMT5 encoder: transformers' recorded outputs, padding, and its config."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch
from convert.umt5 import name_table, untie
from qvgen_jax.errors import UserError
from qvgen_jax.text.umt5 import UMT5Config, UMT5Encoder, relative_position_buckets

GOLDEN = Path(__file__).parent.parent / "golden/umt5.npz"
TINY = {
    "vocab_size": 20,
    "d_model": 12,
    "d_kv": 4,
    "num_heads": 2,
    "d_ff": 16,
    "num_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
}
# As published with Wan 2.1: the fields that decide a shape or are checked.
UMT5_XXL = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "feed_forward_proj": "gated-gelu",
    "layer_norm_epsilon": 1e-06,
    "model_type": "umt5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 256384,
}


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def params(golden) -> dict:
    shapes = json.loads(str(golden["shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(golden["weights"].astype(np.float32), ends)
    weights = {k: v.reshape(shape) for (k, shape), v in zip(shapes.items(), parts, strict=True)}
    return from_torch(name_table(UMT5Config.from_json(TINY)), weights)


def abstract(fields: dict, dtype: jnp.dtype = jnp.float32) -> UMT5Encoder:
    config = UMT5Config.from_json(fields)
    return nnx.eval_shape(lambda: UMT5Encoder(config, key=jax.random.key(0), dtype=dtype))


def run(params: dict, ids: np.ndarray, mask: np.ndarray, dtype=jnp.float32) -> np.ndarray:
    graph = nnx.graphdef(abstract(TINY, dtype))
    with jax.default_matmul_precision("highest"):
        out = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x))(params, ids, mask)
    return np.asarray(out, np.float32)


def test_the_embeddings_equal_what_transformers_recorded(golden, params):
    got = run(params, golden["ids"], golden["mask"])
    assert np.abs(got - golden["embeds"]).max() < 1e-5 * np.abs(golden["embeds"]).max()


def test_bfloat16_computes_the_same_embeddings_up_to_its_rounding(golden, params):
    got = run(params, golden["ids"], golden["mask"], jnp.bfloat16)
    assert np.abs(got - golden["embeds"]).max() < 0.05 * np.abs(golden["embeds"]).max()


def test_padding_does_not_change_the_real_tokens(golden, params):
    ids, mask = golden["ids"][:1], golden["mask"][:1]
    length = int(mask.sum())
    padded, cut = run(params, ids, mask), run(params, ids[:, :length], mask[:, :length])
    np.testing.assert_allclose(padded[:, :length], cut, atol=1e-5)


def test_near_distances_have_a_bucket_each_and_far_ones_share():
    from_first = relative_position_buckets(200, 32, 128)[0]
    to_first = relative_position_buckets(200, 32, 128)[:, 0]
    np.testing.assert_array_equal(from_first[:9], [0, *range(17, 25)])
    np.testing.assert_array_equal(to_first[:9], range(9))
    assert from_first[128:].tolist() == [31] * 72
    assert to_first[128:].tolist() == [15] * 72


def test_the_real_encoder_has_its_number_of_parameters():
    state = nnx.state(abstract(UMT5_XXL), nnx.Param)
    d, ff = 4096, 10240
    block = 4 * d * d + 3 * d * ff + 32 * 64 + 2 * d
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 256384 * d + 24 * block + d


def test_the_embedding_is_found_under_either_of_its_names():
    shared, tied = np.zeros((2, 3)), np.ones((2, 3))
    assert untie({"shared.weight": shared, "encoder.embed_tokens.weight": tied}) == {
        "shared.weight": shared
    }
    assert untie({"encoder.embed_tokens.weight": tied}) == {"shared.weight": tied}


@pytest.mark.parametrize(
    ("fields", "named"),
    [({"model_type": "t5"}, "model_type = 't5'"), ({"feed_forward_proj": "relu"}, "'relu'")],
)
def test_other_encoders_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        UMT5Config.from_json(UMT5_XXL | fields)
