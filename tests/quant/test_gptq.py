"""GPTQ against the algorithm it makes fast, in float64, and what it is for."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.quant.gptq import compensation, gptq_codes
from qvgen_jax.quant.weights import dequantize_weight, quantize_weight, search_range

IN, OUT, BITS = 24, 10, 4
LEVELS = jnp.float32(2**BITS - 1)


def drawn(width=IN, seed=0):
    """Tokens whose channels go together, as a network's do, and a kernel."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(400, width)) @ rng.normal(size=(width, width)) + rng.normal(size=width)
    return x.astype(np.float32), rng.normal(size=(width, OUT)).astype(np.float32)


def brain_surgeon(kernel, gram, scale, zero_point, damping=0.01):
    """Codes by Optimal Brain Quantization in a fixed order (arXiv 2210.17323, eq. 2 and 3).

    The inverse itself, a row and a column of it removed after every channel, in float64.
    """
    weights, codes = kernel.astype(np.float64), np.zeros(kernel.shape, np.int64)
    inverse = np.linalg.inv(gram + damping * np.mean(np.diag(gram)) * np.eye(len(gram)))
    for row in range(len(kernel)):
        code = np.clip(np.round(weights[row] / scale + zero_point), 0, 2**BITS - 1)
        error = weights[row] - scale * (code - zero_point)
        weights -= np.outer(inverse[:, row] / inverse[row, row], error)
        codes[row] = code
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
        inverse[row] = inverse[:, row] = 0  # Rounding would leave traces of what is done.
    return codes - 2 ** (BITS - 1)


def output_error(x, kernel, codes, *rounding):
    difference = np.asarray(dequantize_weight(codes, *rounding)) - kernel
    return np.linalg.norm(x @ difference) / np.linalg.norm(x @ kernel)


@pytest.mark.parametrize("block", [1, 7, IN, 128])
def test_the_codes_are_those_of_optimal_brain_quantization(block):
    x, kernel = drawn()
    gram = (x.astype(np.float64).T @ x).astype(np.float32)
    scale, zero_point = search_range(jnp.asarray(kernel), LEVELS)
    found, _ = gptq_codes(kernel, gram, scale, zero_point, LEVELS, block=block)
    expected = brain_surgeon(kernel, gram, np.float64(scale), np.float64(zero_point))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("by_activity", [False, True])
def test_the_outputs_are_nearer_than_those_of_round_to_nearest(symmetric, by_activity):
    x, kernel = drawn(width=100)
    rounding = (*search_range(jnp.asarray(kernel), LEVELS, symmetric), LEVELS)
    nearest = output_error(x, kernel, quantize_weight(jnp.asarray(kernel), *rounding), *rounding)
    codes, _ = gptq_codes(kernel, x.T @ x, *rounding, by_activity=by_activity)
    assert output_error(x, kernel, codes, *rounding) < 0.8 * nearest  # 0.71 here.


def test_tokens_that_do_not_go_together_leave_round_to_nearest():
    _, kernel = drawn()
    rounding = (*search_range(jnp.asarray(kernel), LEVELS), LEVELS)
    found, _ = gptq_codes(kernel, jnp.eye(IN), *rounding)
    np.testing.assert_array_equal(found, quantize_weight(jnp.asarray(kernel), *rounding))


def test_silent_channels_stand_for_zero_and_disturb_no_other():
    x, kernel = drawn()
    x[:, [3, 17]] = 0
    rounding = (*search_range(jnp.asarray(kernel), LEVELS), LEVELS)
    found, _ = gptq_codes(kernel, x.T @ x, *rounding)
    alone = jnp.round(rounding[1]).clip(0, LEVELS) - 2 ** (BITS - 1)
    np.testing.assert_array_equal(found[3], alone)
    rest = np.delete(np.arange(IN), [3, 17])
    few = np.ascontiguousarray(x[:, rest])
    # The mean of the diagonal, which the damping is a share of, counts silent channels as 1.
    mean = np.mean(np.where(np.sum(x**2, 0) > 0, np.sum(x**2, 0), 1))
    damping = 0.01 * mean / np.mean(np.sum(few**2, 0))
    expected, _ = gptq_codes(kernel[rest], few.T @ few, *rounding, damping=damping)
    np.testing.assert_array_equal(np.asarray(found)[rest], expected)


def test_the_compensation_is_the_upper_factor_of_the_damped_inverse():
    x, _ = drawn()
    gram = np.float64(x.T) @ np.float64(x)
    damped = gram + 0.01 * np.mean(np.diag(gram)) * np.eye(IN)
    expected = np.linalg.cholesky(np.linalg.inv(damped)).T
    found = compensation(jnp.asarray(gram, jnp.float32), 0.01)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_array_equal(found, jnp.triu(found))


def test_sums_without_a_cholesky_factor_are_told():
    x, kernel = drawn()
    rounding = (*search_range(jnp.asarray(kernel), LEVELS), LEVELS)
    gram = x.T @ x
    assert gptq_codes(kernel, gram, *rounding)[1]
    gram[0, 1] = gram[1, 0] = 10 * np.sqrt(gram[0, 0] * gram[1, 1])  # More than any tokens have.
    assert not gptq_codes(kernel, gram, *rounding)[1]
