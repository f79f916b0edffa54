"""The Hopper kernel in Pallas' simulator of a GPU, which also watches for races.

What it does not simulate: swizzles, layouts of registers, the halves of a shared fetch (either
block fetches the whole), and TMA's own conditions on sizes, which compiling checks.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import hopper
from kernels.hopper_tiles import Tile
from kernels.layouts import lay_out
from kernels.operands import Weight
from kernels.quantize_tokens import QuantizedTokens, quantize_tokens
from kernels.reference import quantized_matmul_reference, signed_offset
from tests.kernels.cases import (
    CASES,
    assert_close,
    integer_tokens,
    on_paper,
    real_tokens,
    roundings_of,
)
from tests.kernels.cases import weight_of as weight_of_case

plgpu = pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
needs_simulator = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no simulator of a GPU; 0.11 has",
)

# One after the other as on the device: two stages, so that the ring goes round even for few inputs.
ALONE = Tile(128, 64, stages=2, cluster=1)
PAIRED = Tile(128, 64, stages=2, cluster=2)


def weight_of(bits, inner, columns, *, symmetric=False, biased=True):
    keys = jax.random.split(jax.random.key(inner * columns), 4)
    half = 2 ** (bits - 1)
    codes = jax.random.randint(keys[0], (inner, columns), -half, half, jnp.int8)
    zero_point = jax.random.uniform(keys[1], (columns,), minval=-half, maxval=half - 1)
    return Weight(
        lay_out(codes, bits, "columns"),
        jax.random.uniform(keys[2], (columns,), minval=0.01, maxval=0.1),
        None if symmetric else zero_point,
        jnp.sum(codes, 0, dtype=jnp.int32).astype(jnp.float32),
        jax.random.normal(keys[3], (columns,)) if biased else None,
    )


def tokens_of(bits, rows, inner):
    """Ordinary tokens, and one each of zeros only, a constant, and an outlier."""
    x = jax.random.normal(jax.random.key(rows), (rows, inner))
    if rows > 3:
        x = x.at[1].set(0).at[2].set(-3).at[3, inner // 2].set(300)
    one = jnp.asarray(0.95)
    return quantize_tokens(x, one, one, jnp.asarray(2.0**bits - 1))


def definition(tokens, weight):
    """The product as `kernels.reference` defines it, in float64."""
    with jax.enable_x64(True):
        levels = jnp.asarray(15.0)
        zero_point = 0.0 if weight.zero_point is None else np.asarray(weight.zero_point, "f8")
        y = quantized_matmul_reference(
            tokens.codes,
            *(np.asarray(x, "f8") for x in (tokens.scale, tokens.zero_point)),
            np.asarray(weight.codes.astype(jnp.int8)).T,
            np.asarray(weight.scale, "f8"),
            zero_point + signed_offset(levels),
            levels,
        )
        return np.asarray(y + (0 if weight.bias is None else np.asarray(weight.bias, "f8")))


def simulate(tokens, weight, tile, out_dtype=jnp.float32):
    y = hopper.quantized_matmul(tokens, weight, out_dtype=out_dtype, interpret=True, tile=tile)
    y = np.asarray(y.astype(jnp.float32))
    # Nothing public tells; jax's own tests ask the same.
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found
    return y


@needs_simulator
@pytest.mark.parametrize(
    ("rows", "inner", "columns", "bits", "tile"),
    [
        (1, 129, 64, 4, ALONE),
        (130, 96, 200, 3, ALONE),
        (600, 300, 72, 4, PAIRED),
        (257, 257, 33, 8, PAIRED),
        # As CogVideoX1.5's 45,106 tokens: the last two of 8 rows, alone in a tile and a cluster.
        (514, 128, 64, 4, PAIRED),
        # Two of the table's tiles as they are.
        (136, 520, 264, 4, Tile(128, 256, stages=4, cluster=2)),
        (264, 264, 64, 4, Tile(256, 128, stages=4, cluster=1)),
    ],
)
def test_integers_equal_the_definition(rows, inner, columns, bits, tile):
    half = 2 ** (bits - 1)
    keys = jax.random.split(jax.random.key(rows), 2)
    codes = jax.random.randint(keys[0], (rows, inner), -half, half, jnp.int8)
    codes = codes.at[0].set(-half)
    weight = jax.random.randint(keys[1], (inner, columns), -half, half, jnp.int8)
    weight = weight.at[:, 0].set(-half)
    ones, zeros = jnp.ones, jnp.zeros
    y = simulate(
        QuantizedTokens(codes, ones((rows, 1)), zeros((rows, 1)), zeros((rows, 1))),
        Weight(lay_out(weight, bits, "columns"), ones(columns), None, zeros(columns)),
        tile,
    )
    expected = np.asarray(codes, np.int64) @ np.asarray(weight, np.int64)
    # 257 products of 2^14 still are exact as float32, so that nothing hides the integers.
    assert abs(expected).max() < 2**24
    np.testing.assert_array_equal(y, expected)


@needs_simulator
@pytest.mark.parametrize(
    ("rows", "weight_bits", "act_bits", "how"),
    [
        (130, 4, 4, {}),
        (5, 3, 3, {"symmetric": True}),
        (9, 4, 8, {"biased": False}),
        (4, 8, 8, {"symmetric": True, "biased": False}),
    ],
)
def test_results_equal_the_definition(rows, weight_bits, act_bits, how):
    tokens, weight = tokens_of(act_bits, rows, 200), weight_of(weight_bits, 200, 96, **how)
    expected = definition(tokens, weight)
    # Float32 corrections cancel: one part in 10^5 of the largest output.
    atol = 1e-5 * abs(expected).max()
    np.testing.assert_allclose(simulate(tokens, weight, ALONE), expected, rtol=0, atol=atol)


def test_a_result_of_any_number_of_rows_is_written_in_place():
    """Slicing CogVideoX1.5's widest out of a padded one would copy 1.1 GB."""
    operands = jax.eval_shape(lambda: (tokens_of(4, 18, 128), weight_of(4, 128, 64)))
    jaxpr = jax.make_jaxpr(lambda *x: hopper.quantized_matmul(*x, out_dtype=jnp.bfloat16))
    last = jaxpr(*operands).eqns[-1]
    assert last.outvars[0].aval.shape == (18, 64)
    assert "slice" not in last.primitive.name


@needs_simulator
@pytest.mark.parametrize("case", CASES, ids=str)
def test_real_inner_sizes_and_tokens_that_hurt(case):
    # The integers alone too where their sums are longest, or end inside a step.
    if max(case.bits) <= 4 and case.inner in (13824, 1537):
        tokens, weight = integer_tokens(case), weight_of_case(case, "columns", integers=True)
        y = simulate(tokens, weight, ALONE)
        np.testing.assert_array_equal(y, on_paper(tokens, weight_of_case(case, integers=True)))
    _, tokens = real_tokens(case)
    plain = weight_of_case(case)
    y = simulate(tokens, weight_of_case(case, "columns"), ALONE)
    assert_close(y, on_paper(tokens, plain), roundings_of(tokens, plain))


@needs_simulator
def test_bfloat16_is_rounded_once_at_the_end():
    tokens, weight = tokens_of(4, 40, 144), weight_of(4, 144, 96)
    expected = definition(tokens, weight)
    found = simulate(tokens, weight, ALONE, jnp.bfloat16)
    # Half a unit in the last of eight bits, and float32's own error next to it.
    np.testing.assert_allclose(found, expected, rtol=2**-8, atol=1e-5 * abs(expected).max())


def test_without_a_simulator_interpreting_is_refused(monkeypatch):
    monkeypatch.delattr(plgpu, "InterpretGPUParams", raising=False)
    with pytest.raises(NotImplementedError, match=r"cannot interpret .* use jax >= 0\.11"):
        hopper.quantized_matmul(
            tokens_of(4, 2, 16), weight_of(4, 16, 8), out_dtype=jnp.float32, interpret=True
        )
