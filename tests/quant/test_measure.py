"""The numbers of each layer against numpy, computed by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.initialize import quantize_params
from qvgen_jax.quant.measure import measure_layers
from qvgen_jax.quant.named import layer_at

NAMES = ("blocks.up", "out")


def student(symmetric: bool) -> tuple[dict, dict]:
    """Two stacked linears of 12 x 20 and one of 20 x 2: less than its branch's rank of 3."""
    rng = np.random.default_rng(0)
    params = {
        "blocks": {"up": {"kernel": jnp.asarray(rng.normal(size=(2, 12, 20)), jnp.float32)}},
        "out": {"kernel": jnp.asarray(rng.normal(size=(20, 2)), jnp.float32)},
    }
    quant = QuantConfig(weight_bits=3, rank=3, buckets=5, symmetric_weights=symmetric)
    params, levels = quantize_params(params, NAMES, quant)
    clips = jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)
    params["blocks"]["up"] |= {"lower": clips, "upper": clips + 1}
    return params, levels


def of_layer(node: dict, layer: int) -> dict:
    stacked = node["kernel"].ndim == 3
    return {k: np.asarray(v[layer] if stacked else v, np.float64) for k, v in node.items()}


@pytest.mark.parametrize("symmetric", [False, True])
def test_every_layer_has_the_numbers_that_numpy_gives(symmetric):
    params, levels = student(symmetric)
    gate = np.array([1, 0.25, 0], np.float32)
    found = measure_layers(params, levels, NAMES, jnp.asarray(gate))
    assert {name: len(rows) for name, rows in found.items()} == {"blocks.up": 2, "out": 1}
    for name, rows in found.items():
        for layer, row in enumerate(rows):
            node = of_layer(layer_at(params, name), layer)
            zero = node.get("zero_point", 4.0)  # Symmetric 3 bits: the middle of 0 to 7.
            codes = np.clip(np.round(node["kernel"] / node["scale"] + zero), 0, 7)
            gap = np.linalg.norm(node["scale"] * (codes - zero) - node["kernel"])
            # float32 sums of 240 squares; a value that lies on a boundary would show as 1e-2.
            error = gap / np.linalg.norm(node["kernel"])
            assert row["weight_error"] == pytest.approx(error, rel=1e-5)
            branch = (node["L"] * gate) @ node["R"]
            assert row["branch_norm"] == pytest.approx(np.linalg.norm(branch), rel=1e-5)
            values = np.linalg.svd(branch, compute_uv=False)[:2]  # Of rank 2: two of three live.
            np.testing.assert_allclose(row["singular_values"], values, rtol=1e-4)
            for clip, leaf in (("clip_low", "lower"), ("clip_high", "upper")):
                mean = np.mean(1 / (1 + np.exp(-node[leaf])))
                assert row[clip] == pytest.approx(mean, rel=1e-5)


def test_without_a_branch_there_are_no_numbers_of_it():
    params, levels = student(symmetric=False)
    for rows in measure_layers(params, levels, NAMES).values():
        for row in rows:
            assert row["branch_norm"] is None
            assert row["singular_values"] is None
            assert 0 < row["weight_error"] < 0.5


@pytest.mark.parametrize("act_range", ["learned", "learned_zero"])
def test_layers_with_learned_steps_have_no_clips_to_tell_of(act_range):
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(20, 2)), jnp.float32)
    quant = QuantConfig(rank=0, act_range=act_range)
    moments = {"out": jnp.ones(3)}
    student = quantize_params({"out": {"kernel": kernel}}, ["out"], quant, moments=moments)
    (row,) = measure_layers(*student, ["out"])["out"]
    assert set(row) == {"weight_error", "branch_norm", "singular_values"}
