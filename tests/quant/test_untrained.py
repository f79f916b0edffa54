"""What defines each method without training, on one linear; numpy says what should come out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.quant.smoothing_search import exponents, search_factors
from qvgen_jax.quant.svd_branch import refined_branch, svd_branch
from qvgen_jax.quant.token_error import branch_weight, outputs, prepared, relative
from qvgen_jax.quant.untrained import Choices, Seen, prepared_gram, quantize_linear
from qvgen_jax.quant.weights import dequantize_weight, min_max_range, quantize_weight

IN, OUT, ROWS = 64, 48, 200
LEVELS = (jnp.float32(15), jnp.float32(15))


@pytest.fixture(scope="module")
def layer():
    """A kernel and its tokens: two channels always loud, two others in half of the tokens alone."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, IN))
    x[:, [5, 40]] *= 30
    x[::2, [11, 50]] *= 12
    kernel = rng.normal(size=(IN, OUT)) * rng.uniform(0.5, 2, size=(IN, 1))
    kernel[[5, 40]] *= 0.1  # As in trained models: loud channels are listened to less.
    return jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32)


def seen(x) -> Seen:
    return Seen(jnp.abs(x).max(0), x, x.T @ x)


def by_numpy(x, low, high, levels):
    """Fake quantization of `[..., n]` with integer zero points, in float64."""
    scale = (high - low) / levels
    zero_point = np.clip(np.round(-low / scale), 0, levels)
    return scale * (np.clip(np.round(x / scale) + zero_point, 0, levels) - zero_point)


def rounded_tokens(x):
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    return by_numpy(x, low, high, 15)


def rounded_kernel(kernel):
    low, high = np.minimum(kernel.min(0), 0), np.maximum(kernel.max(0), 0)
    return by_numpy(kernel, low, high, 15)


def test_round_to_nearest_is_what_numpy_computes(layer):
    x, kernel = (np.asarray(a, np.float64) for a in layer)
    made = quantize_linear(layer[1], seen(layer[0]), LEVELS, Choices())
    found = dequantize_weight(made.codes, made.scale, made.zero_point, LEVELS[0])
    np.testing.assert_allclose(found, rounded_kernel(kernel), atol=1e-5)
    y = rounded_tokens(x) @ rounded_kernel(kernel)
    error = np.linalg.norm(y - x @ kernel) / np.linalg.norm(x @ kernel)
    # A token's code at a boundary may fall to the other side in float32.
    np.testing.assert_allclose(made.output_error, error, rtol=2e-3)


def test_smoothing_moves_what_is_loud_from_tokens_to_the_kernel(layer):
    x, kernel = layer
    made = quantize_linear(kernel, seen(x), LEVELS, Choices(smoothing="fixed", exponent=0.5))
    loud, listening = jnp.abs(x / made.factors).max(0), jnp.abs(kernel.T * made.factors).max(0)
    # At 1/2 both are sqrt(max|x| max|w|), up to the one factor that all channels share.
    np.testing.assert_allclose(loud / listening, jnp.full(IN, (loud / listening)[0]), rtol=1e-4)
    plain = quantize_linear(kernel, seen(x), LEVELS, Choices())
    assert made.output_error < 0.7 * plain.output_error  # 0.46 here.


def test_the_search_takes_the_exponents_with_the_least_error_that_numpy_finds(layer):
    x, kernel = (np.asarray(a, np.float64) for a in layer)
    factors, errors = search_factors(jnp.abs(layer[0]).max(0), layer[1], layer[0], LEVELS, points=4)
    assert exponents(4).tolist()[0] == [0, 0]
    expected, tried = [], []
    for alpha, beta in exponents(4).astype(np.float64):
        s = np.abs(x).max(0) ** alpha / np.abs(kernel).max(1) ** beta
        s = s / np.exp(np.log(s).mean())
        y = rounded_tokens(x / s) @ rounded_kernel(kernel * s[:, None])
        expected.append(np.linalg.norm(y - x @ kernel) / np.linalg.norm(x @ kernel))
        tried.append(s)
    np.testing.assert_allclose(errors, expected, rtol=5e-3)  # Codes beside a boundary.
    np.testing.assert_allclose(factors, tried[int(np.argmin(expected))], rtol=1e-4)


def test_what_the_branch_leaves_of_a_smoothed_kernel_is_the_tail_of_its_singular_values(layer):
    x, kernel = layer
    made = quantize_linear(kernel, seen(x), LEVELS, Choices(smoothing="searched", rank=8))
    smoothed = np.asarray(kernel * made.factors[:, None], np.float64)
    residual = smoothed - np.asarray(branch_weight(made.branch), np.float64)
    tail = np.linalg.svd(smoothed, compute_uv=False)[8:]
    # The branch is bfloat16, and what that loses of it is in the residual: 2^-9 of the branch.
    slack = 2**-8 * np.linalg.norm(smoothed)
    assert abs(np.linalg.norm(residual) - np.linalg.norm(tail)) < slack
    assert np.linalg.norm(residual) < 0.8 * np.linalg.norm(smoothed)
    # And it is what is quantized: codes and residual are nowhere more than half a step apart.
    codes = dequantize_weight(made.codes, made.scale, made.zero_point, LEVELS[0])
    assert np.all(np.abs(codes - residual) <= 0.51 * np.asarray(made.scale))


def test_a_branch_that_reads_tokens_brings_outputs_nearer_than_smoothing_alone(layer):
    x, kernel = layer
    smoothed = quantize_linear(kernel, seen(x), LEVELS, Choices(smoothing="searched"))
    made = quantize_linear(kernel, seen(x), LEVELS, Choices(smoothing="searched", rank=8))
    assert made.output_error < 0.9 * smoothed.output_error


@pytest.mark.slow
def test_more_iterations_of_the_branch_never_lose_more(layer):
    x, kernel = layer

    def quantized(rest):
        weight = (*min_max_range(rest, LEVELS[0]), LEVELS[0])
        return dequantize_weight(quantize_weight(rest, *weight), *weight)

    def error(iterations):
        branch, rest = refined_branch(kernel, 8, quantized, x, LEVELS[1], iterations)
        np.testing.assert_allclose(rest, kernel - branch_weight(branch), atol=1e-6)
        return relative(outputs(x, quantized(rest), LEVELS[1], branch), x @ kernel)

    once, often = error(1), error(6)
    assert once == relative(
        outputs(x, quantized(svd_branch(kernel, 8)[1]), LEVELS[1], svd_branch(kernel, 8)[0]),
        x @ kernel,
    )
    assert often < once


def peak(x) -> float:
    """The mean over tokens of the loudest channel by the root mean square of all."""
    return float(jnp.mean(jnp.abs(x).max(1) / jnp.sqrt(jnp.square(x).mean(1))))


def test_scaling_balances_the_channels_that_are_always_loud_and_rotation_the_others(layer):
    """ViDiT-Q's static-dynamic balance (arXiv 2406.02540): neither does what both do."""
    x, kernel = layer
    fine = (jnp.float32(255), LEVELS[1])  # What the tokens lose is what is compared.
    rows = {
        "scaled": Choices(smoothing="fixed"),
        "rotated": Choices(rotation="hadamard"),
        "both": Choices(smoothing="fixed", rotation="hadamard"),
    }
    made = {
        name: quantize_linear(kernel, seen(x), fine, row, 64 if row.rotation != "none" else 1)
        for name, row in rows.items()
    }
    # In the tokens in which other channels than always are loud.
    factors, moved = made["both"].factors, x[::2]
    scaled, both = peak(prepared(moved, factors, 1)), peak(prepared(moved, factors, 64))
    assert both < 0.7 * scaled < 0.7 * peak(moved)  # 2.5, 4.0 and 6.4 here.
    errors = {name: float(each.output_error) for name, each in made.items()}
    assert errors["both"] < 0.9 * min(errors["scaled"], errors["rotated"]), errors


@pytest.mark.parametrize(
    "choices",
    [
        Choices(smoothing="fixed", rotation="hadamard"),
        pytest.param(
            Choices(smoothing="searched", points=3, rank=4, range="search", rounding="gptq"),
            marks=pytest.mark.slow,
        ),
        Choices(range="search", symmetric=True),
    ],
    ids=["vidit_q", "svdquant with gptq", "symmetric"],
)
def test_at_eight_bits_a_linear_says_what_it_said(layer, choices):
    x, kernel = layer
    levels = (jnp.float32(255), jnp.float32(255))
    made = quantize_linear(
        kernel, seen(x), levels, choices, 64 if choices.rotation != "none" else 1
    )
    assert made.output_error < 0.04  # Tokens of 30 sigma in 256 levels: 0.03 where nothing helps.
    assert (made.zero_point is None) == choices.symmetric


def test_second_moments_are_prepared_as_the_tokens_are(layer):
    x, _ = layer
    factors = jnp.exp(jnp.linspace(-1, 1, IN))
    ready = prepared(x, factors, 64)
    found, expected = prepared_gram(x.T @ x, factors, 64), ready.T @ ready
    np.testing.assert_allclose(found, expected, atol=1e-4 * jnp.abs(expected).max())


def test_gptq_loses_less_on_the_tokens_than_round_to_nearest_with_the_same_ranges(layer):
    # The fixture's channels know nothing of each other: what GPTQ lives on is that they do.
    rng = np.random.default_rng(1)
    x = layer[0] @ jnp.asarray(np.eye(IN) + 0.3 * rng.normal(size=(IN, IN)), jnp.float32)
    fine = (LEVELS[0], jnp.float32(255))  # What tokens lose is the same for both.
    nearest, gptq = (
        quantize_linear(layer[1], seen(x), fine, Choices(range="search", rounding=rounding))
        for rounding in ("nearest", "gptq")
    )
    np.testing.assert_array_equal(gptq.scale, nearest.scale)
    assert gptq.output_error < 0.8 * nearest.output_error
    assert gptq.weight_error > nearest.weight_error  # At the price of the weights themselves.


@pytest.mark.slow
def test_no_channel_of_nothing_makes_something_that_is_no_number():
    x, kernel = jnp.zeros((10, IN)), jnp.ones((IN, OUT)).at[3].set(0)
    choices = Choices("searched", points=3, rank=4, range="search", rounding="gptq")
    made = quantize_linear(kernel, seen(x), LEVELS, choices)
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(made))
