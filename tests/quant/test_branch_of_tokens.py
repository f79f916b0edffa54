"""A branch that reads tokens, from the format to what a layer says."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from kernels.chips import CHIPS
from kernels.fused_quantize import Normalized
from kernels.quantize_tokens import dequantize_tokens, quantize_tokens
from qvgen_jax.errors import UserError
from qvgen_jax.quant.apply import apply_normalized
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels, QuantContext
from qvgen_jax.quant.packed import (
    leaves_of,
    pack_tensors,
    quantization_config,
    read_quantization_config,
    unpack_layer,
)
from qvgen_jax.quant.packed_dense import PackedDense

IN, OUT, RANK = 24, 10, 3
KEPT = QuantConfig(
    rank=RANK, branch_input="tokens", smoothing="searched", rotation="hadamard", buckets=1
)


@pytest.fixture(scope="module")
def parts():
    """Codes, the other tensors and the branch of a random layer."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (OUT, IN)).astype(np.uint8)
    layer = {
        "scale": rng.uniform(0.1, 0.2, OUT),
        "zero_point": rng.uniform(6, 9, OUT),
        "bias": rng.normal(size=OUT),
        "smooth": rng.uniform(0.5, 2, IN),
        "lower": np.full(1, 20.0),
        "upper": np.full(1, 20.0),
    }
    return codes, layer, (rng.normal(size=(OUT, RANK)), rng.normal(size=(RANK, IN)))


def packed(parts, config=KEPT, **options) -> PackedDense:
    codes, layer, branch = parts
    tensors = pack_tensors(codes, layer, 4, branch=branch)
    made = nnx.eval_shape(
        lambda: PackedDense("a", IN, OUT, config=config, key=jax.random.key(0), **options)
    )
    graphdef, _, _ = nnx.split(made, nnx.Param, Levels)
    levels = {"weight_levels": jnp.float32(15), "act_levels": jnp.float32(15)}
    params = unpack_layer(tensors, 4, IN, made.layout)
    return nnx.merge(graphdef, jax.tree.map(jnp.asarray, params), levels)


def test_the_layer_adds_the_branch_of_tokens_that_are_smoothed_and_rotated_but_not_quantized(parts):
    codes, leaves, (left, right) = parts
    layer = packed(parts)
    x = jax.random.normal(jax.random.key(1), (2, 7, IN))
    ready = layer.prepare(x)
    values = dequantize_tokens(quantize_tokens(ready, jnp.ones(()), jnp.ones(()), jnp.float32(15)))
    kernel = (leaves["scale"][:, None] * (codes - leaves["zero_point"][:, None])).T
    stored = [side.astype(ml_dtypes.bfloat16).astype(np.float64) for side in (left, right)]
    expected = np.float64(values) @ kernel + leaves["bias"]
    expected = expected + np.float64(ready) @ stored[1].T @ stored[0].T
    np.testing.assert_allclose(layer(x), expected, atol=1e-5 * np.abs(expected).max())
    of_codes = np.float64(values) @ stored[1].T @ stored[0].T
    assert np.abs(np.float64(ready) @ stored[1].T @ stored[0].T - of_codes).max() > 0.1


def test_such_a_layer_is_never_handed_codes(parts):
    layer = packed(parts)
    x = jax.random.normal(jax.random.key(1), (2, 7, IN))
    with pytest.raises(ValueError, match="reads tokens"):
        layer(quantize_tokens(x, jnp.ones(()), jnp.ones(()), jnp.float32(15)))


def test_a_gpu_does_not_quantize_its_tokens_behind_a_norm(parts, monkeypatch):
    config = QuantConfig(rank=RANK, branch_input="tokens", buckets=1)
    codes, leaves, branch = parts
    leaves = {key: leaf for key, leaf in leaves.items() if key != "smooth"}
    options = {"backend": "hopper", "chip": CHIPS["h100"]}
    layers = [packed((codes, leaves, branch), config, **options) for _ in range(2)]
    tokens = Normalized(jax.random.normal(jax.random.key(1), (2, 7, IN)), 1e-6, jnp.float32)
    handed = []
    monkeypatch.setattr(PackedDense, "__call__", lambda self, x, ctx: handed.append(x))
    apply_normalized(layers, tokens, QuantContext())
    assert [x.shape for x in handed] == [(2, 7, IN)] * 2  # Floats, not codes.


def test_the_format_says_what_the_branch_reads_and_stores_it_in_sixteen_bits(parts):
    codes, layer, branch = parts
    fields = json.loads(json.dumps(quantization_config(KEPT)))
    assert fields["format_version"] == 3
    assert fields["branch_input"] == "tokens"
    assert fields["smoothing"] == "searched"
    read = read_quantization_config(fields)
    assert (read.rank, read.branch_input, read.smoothing) == (RANK, "tokens", "searched")
    tensors = pack_tensors(codes, layer, 4, branch=branch)
    assert sorted(tensors) == sorted(leaves_of(read, "a"))
    assert {tensors[leaf].dtype for leaf in ("L", "R")} == {np.dtype(ml_dtypes.bfloat16)}
    assert unpack_layer(tensors, 4, IN)["R"].nbytes == 2 * RANK * IN


def test_a_branch_of_codes_is_still_version_two():
    fields = quantization_config(QuantConfig(rank=RANK))
    assert fields["format_version"] == 2
    assert "branch_input" not in fields
    assert read_quantization_config(fields).branch_input == "codes"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch_input": "words"}, "branch_input='words'; expected one of codes, tokens"),
        ({"smoothing": 1.5}, "smoothing=1.5; expected 0"),
        ({"smoothing": "sought"}, "smoothing=sought|damaged"),
    ],
)
def test_other_words_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        read_quantization_config({**quantization_config(KEPT), **change})
