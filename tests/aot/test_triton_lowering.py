"""The JAX side of the Triton backend, lowered for a GPU that is not here."""

import re

import jax
import jax.numpy as jnp
import pytest

from kernels.operands import Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.triton_matmul import quantized_matmul
from kernels.triton_quantize import Clip, quantize_gelu, quantize_normalized, quantize_tokens

pytest.importorskip("triton")
try:
    import jax_triton  # noqa: F401
except ImportError as error:  # Also where JAX's CUDA plugin is missing.
    pytest.skip(f"jax-triton cannot be used: {error}", allow_module_level=True)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def operands(rows, inner, columns, bits=4):
    tokens = QuantizedTokens(
        shape(rows, inner, dtype=jnp.int8), *(shape(rows, 1) for _ in range(3))
    )
    width = -(-inner // 2) if bits <= 4 else inner
    weight = Weight(shape(columns, width, dtype=jnp.int8), *(shape(columns) for _ in range(4)))
    return tokens, weight


def lowered(f, *args) -> str:
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def calls(text: str) -> list[str]:
    """Operand and result types of each Triton program in a module."""
    return re.findall(r"custom_call @triton_kernel_call\w*\(.*\) .*: (\(.*\) -> .*)", text)


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("rows", [1, 32760])
def test_the_product_is_one_call_on_the_packed_bytes(capability, rows):
    def f(tokens, weight):
        return quantized_matmul(tokens, weight, out_dtype=jnp.bfloat16, capability=capability)

    (call,) = calls(lowered(f, *operands(rows, 1536, 256)))
    assert f"tensor<{rows}x1536xi8>" in call
    assert "tensor<256x768xi8>" in call
    assert call.rstrip(")").endswith(f"tensor<{rows}x256xbf16>")


def test_the_product_runs_inside_a_scan_over_layers():
    tokens, weight = operands(64, 96, 96, bits=8)
    stack = jax.tree.map(lambda a: shape(3, *a.shape, dtype=a.dtype), weight)

    def f(tokens, stack):
        def layer(tokens, weight):
            y = quantized_matmul(tokens, weight, out_dtype=jnp.float32, capability=80)
            one = jnp.ones((), jnp.float32)
            return quantize_tokens(y, one, one, 15 * one, capability=80), ()

        return jax.lax.scan(layer, tokens, stack)[0]

    assert len(calls(lowered(f, tokens, stack))) == 2


def test_three_clips_are_one_call_with_three_codes():
    def f(x, ratio, scale, shift):
        return quantize_normalized(
            x,
            [Clip(ratio, ratio)] * 3,
            15 * ratio,
            eps=1e-6,
            scale=scale,
            shift=shift,
            rows_per_batch=65,
            capability=90,
        )

    x = shape(130, 1536, dtype=jnp.bfloat16)
    (call,) = calls(lowered(f, x, shape(), shape(2, 1536), shape(2, 1536)))
    assert call.split("->")[1].count("tensor<130x1536xi8>") == 3


def test_a_gelu_and_its_codes_are_one_call():
    def f(x, ratio):
        return quantize_gelu(x, ratio, ratio, 15 * ratio, capability=90)

    (call,) = calls(lowered(f, shape(5, 8960, dtype=jnp.bfloat16), shape()))
    assert "tensor<5x8960xbf16>" in call
