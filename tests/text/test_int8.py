"""int8 text encoders: the error of a weight, of the embeddings, and the memory they need."""

import json
import tracemalloc
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from convert.load import read_text_encoder
from convert.names import torch_names
from convert.t5 import name_table, read_int8
from convert.tensors import write_tensors
from qvgen_jax.errors import UserError
from qvgen_jax.text.int8 import quantize_rows
from qvgen_jax.text.t5 import T5Config, T5Encoder

TINY = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "num_heads": 3,
    "d_ff": 40,
    "num_layers": 3,
    "feed_forward_proj": "gated-gelu",
}


def torch_shape(config: T5Config, name: str) -> tuple[int, ...]:
    d, inner = config.d_model, config.num_heads * config.d_kv
    shapes = {"shared": (config.vocab_size, d), "o": (d, inner), "wo": (d, config.d_ff)}
    shapes |= dict.fromkeys("qkv", (inner, d)) | dict.fromkeys(("wi_0", "wi_1"), (config.d_ff, d))
    shapes["relative_attention_bias"] = (config.relative_attention_num_buckets, config.num_heads)
    return shapes.get(name.split(".")[-2], (d,))


class Drawn(Mapping):
    """An encoder's PyTorch tensors in bfloat16 as T5 starts them, drawn when they are asked for."""

    def __init__(self, config: T5Config):
        self.config, self.names = config, torch_names(name_table(config))

    def __getitem__(self, name: str) -> np.ndarray:
        shape = torch_shape(self.config, name)
        rng = np.random.default_rng(self.names.index(name))
        spread = 1.0 if name == "shared.weight" else shape[-1] ** -0.5
        if name.endswith("q.weight"):
            spread *= self.config.d_kv**-0.5
        values = spread * rng.standard_normal(shape, np.float32) + (len(shape) == 1)
        return values.astype(ml_dtypes.bfloat16)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


@pytest.fixture(scope="module", params=["t5", "umt5"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    fields = TINY | {"model_type": request.param}
    (folder / "config.json").write_text(json.dumps(fields))
    write_tensors(folder / "model.safetensors", dict(Drawn(T5Config.from_json(fields))))
    return folder


def test_a_weight_is_off_by_half_a_step_of_its_row_at_most():
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5000, 7)) * rng.uniform(1e-4, 10, (5000, 1))  # over one block
    weight[17] = 0
    codes, scale = quantize_rows(weight, "w")
    restored = codes * scale[:, None]
    assert (np.abs(restored - weight) <= 0.5001 * scale[:, None]).all()
    largest = np.abs(weight).argmax(1)[:, None]
    np.testing.assert_allclose(
        np.take_along_axis(restored, largest, 1), np.take_along_axis(weight, largest, 1), rtol=1e-6
    )
    assert codes.min() == -127
    assert not restored[17].any()


def test_a_weight_that_is_no_number_is_refused_by_its_name():
    weight = np.ones((3, 4), ml_dtypes.bfloat16)
    weight[1, 2] = np.nan
    with pytest.raises(UserError, match=r"layer\.wo holds infinite values or NaN"):
        quantize_rows(weight, "layer.wo")


def test_int8_embeddings_are_within_3_percent_of_float(folder):
    ids = np.random.default_rng(0).integers(3, 61, (2, 9))
    mask = (np.arange(9) < np.array([[9], [4]])).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        floats = read_text_encoder(folder, jnp.float32)(ids, mask)
        ints = read_text_encoder(folder, jnp.float32, weights="int8")(ids, mask)
    assert not np.asarray(ints)[1, 4:].any()
    error = np.linalg.norm(ints - floats) / np.linalg.norm(floats)
    # 3 layers with 7 matrices each, whose rows of 32 are 0.5 % off: 1.8 % (bfloat16: 0.8 %).
    assert 1e-3 < error < 0.03


def test_int8_computes_what_its_restored_weights_would(folder):
    encoder = read_text_encoder(folder, jnp.float32, weights="int8")
    params = jax.tree.map(
        lambda leaf: (
            leaf["codes"] * np.expand_dims(leaf["scale"], -1 if leaf["codes"].ndim == 2 else -2)
            if isinstance(leaf, dict)
            else leaf
        ),
        encoder.states[0],
        is_leaf=lambda leaf: isinstance(leaf, dict) and "codes" in leaf,
    )
    for group in ("attention", "ffn"):
        layers = params["blocks"][group]
        for name, leaf in layers.items():
            layers[name] = leaf if name == "relative_bias" else {"kernel": leaf}
    plain = nnx.graphdef(nnx.eval_shape(lambda: T5Encoder(encoder.config, key=jax.random.key(0))))
    ids, mask = np.arange(3, 10)[None], np.ones((1, 7), np.int32)
    with jax.default_matmul_precision("highest"):
        expected = nnx.merge(plain, jax.tree.map(jnp.asarray, params))(ids, mask)
        got = encoder(ids, mask)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_reading_never_holds_the_model_in_floats():
    config = T5Config.from_json(
        TINY | {"model_type": "t5", "vocab_size": 40_000, "d_ff": 5000, "num_layers": 12}
    )
    tensors = Drawn(config)
    tracemalloc.start()
    params = read_int8(config, tensors)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = 40_000 * 32
    # Beside the result one source tensor (drawn here in float32 first), a block of rows, its copy.
    assert peak < size + 8 * largest + 3 * 4096 * 4 * 32
    assert peak < 4 * sum(leaf.size for leaf in jax.tree.leaves(params))


def test_the_running_encoder_holds_one_layer_at_a_time_as_floats():
    config = T5Config(64, 256, 32, 512, num_layers=8, num_heads=8)

    def build() -> T5Encoder:
        return T5Encoder(config, key=jax.random.key(0), dtype=jnp.bfloat16, weights="int8")

    graph, shapes = nnx.split(nnx.eval_shape(build))
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    compiled = jax.jit(lambda p, *x: nnx.merge(graph, p)(*x)).lower(shapes, ids, ids).compile()
    layer = 4 * 256 * 256 + 3 * 256 * 512
    # Two bytes and four per weight of a layer: bfloat16, and what the CPU makes of it.
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * layer < 2 * 8 * layer


def test_the_real_encoders_take_a_byte_per_weight():
    for kind, vocabulary, gigabytes in (("umt5", 256_384, 5.69), ("t5", 32_128, 4.77)):
        config = T5Config(vocab_size=vocabulary, model_type=kind)
        encoder = nnx.eval_shape(
            lambda config=config: T5Encoder(config, key=jax.random.key(0), weights="int8")
        )
        leaves = jax.tree.leaves(nnx.state(encoder, nnx.Param))
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        assert size / 1e9 == pytest.approx(gigabytes, abs=0.01)


def test_a_folder_that_does_not_fit_its_config_is_refused(folder, tmp_path):
    tensors = dict(Drawn(T5Config.from_json(json.loads((folder / "config.json").read_text()))))
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    name = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    write_tensors(tmp_path / "model.safetensors", tensors | {name: tensors[name].T})
    with pytest.raises(UserError, match=r"wo\.weight is \[40, 32\], expected \[32, 40\]"):
        read_text_encoder(tmp_path, jnp.float32, weights="int8")
    del tensors[name]
    write_tensors(tmp_path / "model.safetensors", tensors)
    with pytest.raises(UserError, match="1 tensors missing"):
        read_text_encoder(tmp_path, jnp.float32, weights="int8")


def test_other_weights_are_refused(folder):
    with pytest.raises(UserError, match="weights is 'int4'"):
        read_text_encoder(folder, jnp.float32, weights="int4")
