"""A whole packed transformer against one that dequantizes both operands and multiplies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels import triton_quantize
from kernels.chips import CHIPS
from kernels.choose import layout_of
from kernels.layouts import unlay
from kernels.operands import Product
from kernels.quantize_tokens import quantize_tokens
from kernels.reference import quantized_matmul_reference, signed_offset
from qvgen_jax.models import build_transformer, config_from_json, quantizable
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.dense import Levels
from qvgen_jax.quant.dense_factory import dense_factory
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.named import layer_at, with_layer
from qvgen_jax.quant.packed import pack_layer, unpack_layer
from qvgen_jax.quant.packed_dense import PackedDense
from tests.golden import tiny_models

WAN = {"_class_name": "WanTransformer3DModel", **tiny_models.WAN_ODD}
COGVIDEOX = {"_class_name": "CogVideoXTransformer3DModel", **tiny_models.COGVIDEOX}


class DequantizedDense(PackedDense):
    """What a packed linear means, written as one would on paper."""

    def __call__(self, x, ctx):
        tokens = quantize_tokens(x, **self.clip_arguments(x, ctx))
        codes = unlay(self.codes[...], self.in_features, self.layout)
        levels = self.weight_levels[...]
        zero_point = signed_offset(levels) if self.zero_point is None else self.zero_point[...]
        weight = (codes, self.scale[...], zero_point, levels, self.bias[...])
        # The timestep's linears are float32 ones; their sums are compared in float64 too.
        y = quantized_matmul_reference(*(x.astype(jnp.float64) for x in (*tokens[:3], *weight)))
        return y.astype(self.dtype)


def packed_model(fields, quant, dtype, backend="xla", chip=CHIPS["cpu"]):
    """Both networks' definitions, and what they share: params and levels of random weights."""
    config = config_from_json(fields)
    model = build_transformer(config, key=jax.random.key(0))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    params, levels = quantize_params(plain, quantizable(config), quant)
    for name in quant.quantized(quantizable(config)):
        node, bits = layer_at(params, name), quant.bits_of(name)[0]
        stacked = node["kernel"].ndim == 3
        rows = range(len(node["kernel"])) if stacked else (...,)
        inner, columns = node["kernel"].shape[-2:]
        layout = layout_of(backend, Product(None, inner, columns, bits, bits), chip)
        layers = [
            unpack_layer(
                pack_layer({key: leaf[row] for key, leaf in node.items()}, bits),
                bits,
                inner,
                layout,
            )
            for row in rows
        ]
        node = {key: np.stack([layer[key] for layer in layers]) for key in layers[0]}
        params = with_layer(params, name, node if stacked else {k: v[0] for k, v in node.items()})

    def graph(dense):
        built = nnx.eval_shape(
            lambda: build_transformer(
                config, key=jax.random.key(0), dense=dense, dtype=dtype, remat="none"
            )
        )
        return nnx.split(built, nnx.Param, Levels)[0]

    def on_paper(name, fan_in, fan_out, **arguments):
        return DequantizedDense(name, fan_in, fan_out, config=quant, **arguments)

    packed = dense_factory(quant, "packed", backend=backend, chip=chip)
    return config, params, levels, graph(packed), graph(on_paper)


def inputs(config, dtype):
    keys = jax.random.split(jax.random.key(1), 2)
    width = config.text_dim if hasattr(config, "text_dim") else config.text_embed_dim
    latents = jax.random.normal(keys[0], (2, 3, 4, 6, config.in_channels), dtype)
    return latents, jnp.asarray([951.0, 20.0]), jax.random.normal(keys[1], (2, 5, width), dtype)


@pytest.mark.parametrize(
    ("fields", "symmetric"),
    [
        pytest.param(WAN, False, id="wan"),
        pytest.param(WAN, True, id="wan-symmetric", marks=pytest.mark.slow),
        pytest.param(COGVIDEOX, False, id="cogvideox", marks=pytest.mark.slow),
        pytest.param(COGVIDEOX, True, id="cogvideox-symmetric", marks=pytest.mark.slow),
    ],
)
def test_the_integer_model_is_the_dequantized_one_in_float64(fields, symmetric):
    with jax.enable_x64(True):
        quant = QuantConfig(rank=0, symmetric_weights=symmetric, product_dtype="float64")
        config, params, levels, packed, paper = packed_model(fields, quant, jnp.float64)
        found, expected = (
            nnx.merge(graph, params, levels)(*inputs(config, jnp.float64))
            for graph in (packed, paper)
        )
        assert found.dtype == jnp.float64
        # Norms and softmax are float32 inside: a last bit of theirs follows the last one of a
        # float64 sum (found: 1.5e-7, of values about 1). Another code would move it by 1e-2.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "expected"),
    # q, k and v; Wan's second attention reads q alone, and its last norm is modulated too.
    [
        pytest.param(WAN, [3, 1, 1, 1], id="wan"),
        pytest.param(COGVIDEOX, [3, 1], id="cogvideox"),
    ],
)
@pytest.mark.slow
def test_a_gpu_s_quantizers_compute_the_norms_in_front(monkeypatch, fields, expected):
    clips_of_calls = []

    def kernel(flat, clips, levels, *, eps, dtype, **norm):
        clips_of_calls.append(len(clips))
        raise NotImplementedError("there is no GPU")

    monkeypatch.setattr(triton_quantize, "quantize_normalized", kernel)
    quant = QuantConfig(rank=0)

    def forward(*where):
        config, params, levels, graph, _ = packed_model(fields, quant, jnp.float32, *where)
        return nnx.merge(graph, params, levels)(*inputs(config, jnp.float32))

    on_gpu = forward("hopper", CHIPS["h100"])
    assert clips_of_calls == expected
    # The quantizer's definition stood in: other fusions of a float32 norm, no other code, which
    # would move a value by 1e-2.
    np.testing.assert_allclose(on_gpu, forward(), rtol=0, atol=1e-5)
    assert len(clips_of_calls) == len(expected)


def test_a_packed_model_holds_no_full_precision_kernel():
    quant = QuantConfig(rank=0)
    _, params, _, _, _ = packed_model(WAN, quant, jnp.float32)
    largest = max(
        leaf.nbytes for leaf in jax.tree.leaves(params["blocks"]) if leaf.dtype == np.float32
    )
    assert "kernel" not in params["blocks"]["ffn"]["up"]
    codes = params["blocks"]["ffn"]["up"]["codes"]
    assert (codes.dtype, codes.nbytes) == (np.int8, 2 * 12 * 35)  # Two layers, two codes a byte.
    assert largest == 2 * 6 * 24 * 4  # The modulation table.
