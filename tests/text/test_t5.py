"""The T5 and UMT5 encoders: transformers' recorded outputs, padding, and their configs."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.names import from_torch
from convert.t5 import Untied, name_table
from qvgen_jax.errors import UserError
from qvgen_jax.text.t5 import T5Config, T5Encoder, relative_position_buckets
from tests.golden.tiny_models import T5 as TINY

GOLDEN = Path(__file__).parent.parent / "golden"
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
# As published with CogVideoX: the same but for these.
T5_XXL = UMT5_XXL | {"model_type": "t5", "vocab_size": 32128, "torch_dtype": "float16"}


@pytest.fixture(scope="module", params=["t5", "umt5"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(kind) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{kind}.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def config(kind) -> T5Config:
    return T5Config.from_json(TINY | {"model_type": kind})


@pytest.fixture(scope="module")
def params(golden, config) -> dict:
    shapes = json.loads(str(golden["shapes"]))
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])[:-1]
    parts = np.split(golden["weights"].astype(np.float32), ends)
    weights = {k: v.reshape(shape) for (k, shape), v in zip(shapes.items(), parts, strict=True)}
    return from_torch(name_table(config), weights)


def abstract(config: T5Config, dtype: jnp.dtype = jnp.float32) -> T5Encoder:
    return nnx.eval_shape(lambda: T5Encoder(config, key=jax.random.key(0), dtype=dtype))


@functools.cache
def forward(config: T5Config, dtype: jnp.dtype):
    graph = nnx.graphdef(abstract(config, dtype))
    return jax.jit(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask))


def run(config, params: dict, ids: np.ndarray, mask: np.ndarray, dtype=jnp.float32) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(config, dtype)(params, ids, mask), np.float32)


def test_the_embeddings_equal_what_transformers_recorded(golden, config, params):
    got = run(config, params, golden["ids"], golden["mask"])
    assert np.abs(got - golden["embeds"]).max() < 1e-5 * np.abs(golden["embeds"]).max()


def test_bfloat16_computes_the_same_embeddings_up_to_its_rounding(golden, config, params):
    got = run(config, params, golden["ids"], golden["mask"], jnp.bfloat16)
    assert np.abs(got - golden["embeds"]).max() < 0.05 * np.abs(golden["embeds"]).max()


def test_masked_padding_does_not_change_the_real_tokens(golden, config, params):
    ids = golden["ids"][:1]
    mask = (ids != 0).astype(np.int32)
    length = int(mask.sum())
    padded = run(config, params, ids, mask)
    cut = run(config, params, ids[:, :length], mask[:, :length])
    np.testing.assert_allclose(padded[:, :length], cut, atol=1e-5)
    attended = run(config, params, ids, np.ones_like(mask))
    assert np.abs(attended[:, :length] - cut).max() > 0.01


def test_near_distances_have_a_bucket_each_and_far_ones_share():
    from_first = relative_position_buckets(200, 32, 128)[0]
    to_first = relative_position_buckets(200, 32, 128)[:, 0]
    np.testing.assert_array_equal(from_first[:9], [0, *range(17, 25)])
    np.testing.assert_array_equal(to_first[:9], range(9))
    assert from_first[128:].tolist() == [31] * 72
    assert to_first[128:].tolist() == [15] * 72


@pytest.mark.parametrize(("fields", "tables"), [(UMT5_XXL, 24), (T5_XXL, 1)], ids=["umt5", "t5"])
def test_the_real_encoder_has_its_number_of_parameters(fields, tables):
    state = nnx.state(abstract(T5Config.from_json(fields)), nnx.Param)
    d, ff = 4096, 10240
    blocks = 24 * (4 * d * d + 3 * d * ff + 2 * d) + tables * 32 * 64
    count = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert count == fields["vocab_size"] * d + blocks + d


def test_the_embedding_is_found_under_either_of_its_names():
    shared, tied = np.zeros((2, 3)), np.ones((2, 3))
    both = Untied({"shared.weight": shared, "encoder.embed_tokens.weight": tied})
    assert dict(both) == {"shared.weight": shared}
    assert dict(Untied({"encoder.embed_tokens.weight": tied})) == {"shared.weight": tied}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "bert"}, "model_type = 'bert'"),
        ({"feed_forward_proj": "relu"}, "'relu'"),
        ({"model_type": "t5", "feed_forward_proj": "gated-silu"}, "'gated-silu'"),
    ],
)
def test_other_encoders_are_refused_by_name(fields, named):
    with pytest.raises(UserError, match=named):
        T5Config.from_json(UMT5_XXL | fields)


def test_t5_without_a_feed_forward_kind_is_version_1_0_and_refused():
    fields = {name: value for name, value in T5_XXL.items() if name != "feed_forward_proj"}
    with pytest.raises(UserError, match="'relu'"):
        T5Config.from_json(fields)
