"""What the Triton backend decides before there is a GPU or Triton."""

import jax
import jax.numpy as jnp
import pytest

from kernels import triton_launch
from kernels.operands import Product, Weight
from kernels.quantize_tokens import QuantizedTokens
from kernels.triton_matmul import aligned_half, check, layout, quantized_matmul, tile_for
from kernels.triton_quantize import Clip, quantize_normalized, quantize_tokens, row_blocks

INNERS = (64, 256, 1536, 1920, 3072, 5120, 7680, 8960, 12288, 13824)


def sees_a_gpu() -> bool:
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def test_weights_of_up_to_four_bits_lie_two_in_a_byte():
    assert layout(Product(None, 5120, 5120, 3)) == "columns_halved"
    assert layout(Product(None, 5120, 5120, 5)) == "columns"


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
@pytest.mark.parametrize("rows", [1, 2, 512, 17776, 32760, 75600])
@pytest.mark.parametrize("weight_bits", [4, 8])
def test_the_models_products_take_whole_steps_of_the_inner_axis(capability, rows, weight_bits):
    for inner in INNERS:
        tile = tile_for(capability, Product(rows, inner, 5120, weight_bits))
        # Wan's time embedding, 256, and CogVideoX's patches, 64, are less than a step.
        assert aligned_half(inner) % tile.inner == 0 or inner == 64
        assert aligned_half(inner) == inner // 2


def test_rows_are_cut_into_few_chunks_that_waste_little():
    for inner in INNERS[2:]:
        chunks, block = row_blocks(inner)
        assert chunks <= 9
        assert inner <= chunks * block <= 1.07 * inner
    with pytest.raises(NotImplementedError, match="tokens of 40000"):
        row_blocks(40_000)


@pytest.mark.parametrize(
    ("product", "reason"),
    [
        (Product(1, 64, 64, 9), "2 to 8 bits"),
        (Product(1, 64, 64, 4, 1), "2 to 8 bits"),
        (Product(1, 131_072, 64), "at most 131071 inputs"),
        (Product(1, 64, 64, out_dtype=jnp.float16), "bfloat16 or float32"),
    ],
)
def test_what_the_program_cannot_compute_is_refused_with_the_reason(product, reason):
    with pytest.raises(NotImplementedError, match=reason):
        check(product)


def test_a_product_of_unknown_rows_passes():
    check(Product(None, 13824, 5120))


@pytest.mark.skipif(sees_a_gpu(), reason="there is a GPU")
def test_without_triton_or_a_gpu_the_caller_learns_why():
    one = jnp.ones((1, 1))
    tokens = QuantizedTokens(jnp.zeros((1, 64), jnp.int8), one, one, one)
    weight = Weight(jnp.zeros((8, 32), jnp.int8), jnp.ones(8), None, jnp.zeros(8))
    reason = "triton is not installed|JAX sees none"
    with pytest.raises(NotImplementedError, match=reason):
        quantized_matmul(tokens, weight, out_dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match=reason):
        quantize_tokens(jnp.ones((1, 64)), one, one, jnp.float32(15))


def test_a_triton_that_jax_triton_cannot_use_is_refused_with_the_remedy(monkeypatch):
    installed = {"triton": "3.6.0", "jax-triton": "0.4.1"}
    monkeypatch.setattr(triton_launch.metadata, "version", installed.get)
    lines = ["jax>=0.11.0", "triton>=3.7", "pytest; extra == 'tests'"]
    monkeypatch.setattr(triton_launch.metadata, "requires", {"jax-triton": lines}.get)
    reason = r"0\.4\.1 needs triton>=3\.7, and triton 3\.6\.0 is .*; pip install 'triton>=3\.7'"
    with pytest.raises(NotImplementedError, match=reason):
        triton_launch.check_triton()
    installed["triton"] = "3.9.0"
    triton_launch.check_triton()


def test_operands_that_do_not_go_together_are_named():
    x, clip = jnp.ones((4, 64)), Clip(jnp.ones(()), jnp.ones(()))
    with pytest.raises(ValueError, match="scale with shift"):
        quantize_normalized(x, [clip], jnp.float32(15), eps=1e-6, scale=jnp.ones((1, 64)))
    with pytest.raises(ValueError, match=r"rows_per_batch=2.*expected \(2, 64\)"):
        quantize_normalized(
            x,
            [clip],
            jnp.float32(15),
            eps=1e-6,
            scale=jnp.ones((1, 64)),
            shift=jnp.ones((1, 64)),
            rows_per_batch=2,
        )
    with pytest.raises(ValueError, match="4 clips"):
        quantize_normalized(x, [clip] * 4, jnp.float32(15), eps=1e-6)
