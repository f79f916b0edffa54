"""The low-rank branch: start, refactoring, end."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qvgen_jax.quant.low_rank import (
    change_of_basis,
    cut_tree,
    dense_svd,
    drop_branch,
    initial_branch,
    randomized_svd,
    refactor,
    refactor_tree,
    small_singular_share,
    zero_branch,
)


def branch(out=11, rank=8, in_features=17, key=0):
    keys = jax.random.split(jax.random.key(key))
    return jax.random.normal(keys[0], (out, rank)), jax.random.normal(keys[1], (rank, in_features))


def test_the_start_leaves_the_tail_of_the_singular_values():
    kernel = jax.random.normal(jax.random.key(1), (17, 11))
    dequantized = kernel + 0.1 * jax.random.normal(jax.random.key(2), (17, 11))
    singular = np.linalg.svd(np.asarray(kernel - dequantized), compute_uv=False)
    for rank in (1, 4, 11):
        left, right = initial_branch(kernel, dequantized, rank)
        assert (left.shape, right.shape) == ((11, rank), (rank, 17))
        rest = jnp.linalg.norm((kernel - dequantized).T - left @ right)
        np.testing.assert_allclose(rest, np.linalg.norm(singular[rank:]), atol=1e-5)


def test_a_rank_beyond_the_matrix_is_filled_with_zeros():
    left, right = initial_branch(jnp.eye(3, 5), jnp.zeros((3, 5)), 8)
    np.testing.assert_allclose((left @ right).T, jnp.eye(3, 5), atol=1e-6)
    np.testing.assert_array_equal(left[:, 3:], 0)
    np.testing.assert_array_equal(right[3:], 0)


def test_randomized_svd_is_nearly_as_good_as_the_dense_one():
    # Uniform noise, like a quantization error: the flat spectrum is the hard case.
    matrix = jax.random.uniform(jax.random.key(3), (300, 200), jnp.float32, -0.5, 0.5)
    captured = [
        jnp.linalg.norm(left @ right)
        for left, right in (f(matrix, 16) for f in (randomized_svd, dense_svd))
    ]
    assert captured[0] >= 0.99 * captured[1]


@pytest.mark.parametrize("shape", [(11, 8, 17), (5, 8, 17), (5, 8, 6), (40, 8, 3)])
@pytest.mark.parametrize("rank", [8, 4, 1])
def test_refactoring_equals_the_dense_svd_of_the_living_components(shape, rank):
    left, right = branch(*shape)
    product = left[:, :rank] @ right[:rank]
    new_left, new_right = refactor(left, right, rank)
    assert (new_left.shape, new_right.shape) == (left.shape, right.shape)
    # Float32: an orthonormal basis and an SVD, sums of at most 40 products.
    np.testing.assert_allclose(new_left @ new_right, product, atol=1e-4)
    singular = np.linalg.svd(np.asarray(product), compute_uv=False)[:rank]
    norms = np.sqrt(singular)
    np.testing.assert_allclose(jnp.linalg.norm(new_left, axis=0)[: len(norms)], norms, atol=2e-3)
    np.testing.assert_allclose(jnp.linalg.norm(new_right, axis=1)[: len(norms)], norms, atol=2e-3)
    np.testing.assert_array_equal(new_left[:, rank:], 0)
    np.testing.assert_array_equal(new_right[rank:], 0)


def test_a_traced_rank_serves_all_phases_with_one_compilation():
    left, right = branch()
    traces = []

    @jax.jit
    def run(rank):
        traces.append(rank)
        return refactor(left, right, rank)

    for rank in (8, 4, 2, 1):
        ours, expected = run(rank), refactor(left, right, rank)
        np.testing.assert_allclose(ours[0] @ ours[1], expected[0] @ expected[1], atol=1e-4)
    assert len(traces) == 1


def test_stacked_branches_are_refactored_layer_by_layer_and_other_leaves_kept():
    left, right = (jnp.stack(pair) for pair in zip(branch(key=0), branch(key=1), strict=True))
    params = {"blocks": {"to_q": {"L": left, "R": right, "kernel": jnp.ones(3)}}, "x": jnp.ones(1)}
    new = refactor_tree(params, 4)
    expected = refactor(left[1], right[1], 4)
    to_q = new["blocks"]["to_q"]
    np.testing.assert_allclose(to_q["L"][1] @ to_q["R"][1], expected[0] @ expected[1], atol=1e-4)
    np.testing.assert_array_equal(to_q["kernel"], 1)


def test_a_refactored_branch_survives_an_optimizer_step():
    left, right = branch()
    params = {"a": {"L": left, "R": right}}
    groups = {"branch": optax.adamw(1e-3), "rest": optax.adamw(1e-3)}
    optimizer = optax.multi_transform(groups, {"a": {"L": "branch", "R": "branch"}})
    state = optimizer.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    _, state = optimizer.update(grads, state, params)
    params, state = refactor_tree(params, 4), zero_branch(state)
    assert all(float(abs(x).max()) in (0, 1) for x in jax.tree.leaves(state))
    living = jax.tree.map(lambda x: (x != 0).astype(x.dtype), params)
    updates, _ = optimizer.update(living, state, params)
    moved = optax.apply_updates(params, updates)
    # The masters themselves moved by one small step: nothing restores what was there before.
    np.testing.assert_allclose(moved["a"]["L"], params["a"]["L"], atol=2e-3)
    np.testing.assert_array_equal(moved["a"]["L"][:, 4:], 0)


def test_dropping_removes_the_branch_from_params_and_optimizer_state():
    params = {"a": dict(zip("LR", branch(), strict=True)) | {"kernel": jnp.ones(3)}}
    labels = {"a": {"L": "branch", "R": "branch", "kernel": "rest"}}
    groups = {"branch": optax.adamw(1e-3), "rest": optax.adamw(1e-3)}

    def optimizer(labels):
        return optax.chain(optax.clip_by_global_norm(1.0), optax.multi_transform(groups, labels))

    state = optimizer(labels).init(params)
    dropped = drop_branch(params)
    assert set(dropped["a"]) == {"kernel"}
    fresh = optimizer(drop_branch(labels)).init(dropped)
    assert jax.tree.structure(drop_branch(state)) == jax.tree.structure(fresh)


def test_share_of_small_singular_values():
    values = jnp.asarray([15.0, 2.0, 1.0, 0.5])
    params = {"a": {"L": jnp.eye(9, 4) * values, "R": jnp.eye(4, 7)}}
    np.testing.assert_allclose(small_singular_share(params), 0.5)
    assert jnp.isnan(small_singular_share({"a": {"kernel": values}}))


def test_many_stacked_branches_refactor_at_once_without_a_standstill():
    """Batched LAPACK calls in one program hung on two cores, which no test could catch inside."""
    program = """
import jax, jax.numpy as jnp
from qvgen_jax.quant.low_rank import refactor_tree, small_singular_share
branch = {"L": jnp.ones((6, 128, 32)), "R": jnp.ones((6, 32, 128))}
tree = {str(i): jax.tree.map(lambda x: x * (i + 1.0), branch) for i in range(20)}
jax.block_until_ready(jax.jit(refactor_tree)(tree, jnp.int32(16)))
jax.block_until_ready(jax.jit(small_singular_share)(tree))
"""
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", program], cwd=root, check=True, timeout=240)


@pytest.mark.parametrize("rank", [4, 8])
def test_the_largest_leave_first_when_asked(rank):
    left, right = branch()
    params = refactor_tree({"a": {"L": left, "R": right}}, rank, "largest")["a"]
    smallest = refactor_tree({"a": {"L": left, "R": right}}, rank)["a"]
    np.testing.assert_allclose(params["L"] @ params["R"], smallest["L"] @ smallest["R"], atol=1e-4)
    norms = np.linalg.norm(params["L"], axis=0)
    assert np.all(np.diff(norms[:rank]) > 0)
    np.testing.assert_array_equal(norms[rank:], 0)


def test_cutting_keeps_the_living_columns_as_they_are():
    left, right = branch()
    params = cut_tree({"a": {"L": left, "R": right}}, 3)["a"]
    np.testing.assert_array_equal(params["L"][:, :3], left[:, :3])
    np.testing.assert_array_equal(params["R"][:3], right[:3])
    assert not params["L"][:, 3:].any()
    assert not params["R"][3:].any()


def test_gradients_turn_with_the_basis():
    left, right = branch(rank=4)
    new_left, new_right = refactor(left, right, 4)

    def loss(pair):
        return jnp.sum(jnp.sin(pair[0] @ pair[1]))

    before, after = jax.grad(loss)((left, right)), jax.grad(loss)((new_left, new_right))
    for_left, for_right = change_of_basis(left, right, new_left, new_right)
    # float32; the basis is as badly conditioned as the branch.
    np.testing.assert_allclose(before[0] @ for_left, after[0], atol=2e-4)
    np.testing.assert_allclose(for_right @ before[1], after[1], atol=2e-4)
