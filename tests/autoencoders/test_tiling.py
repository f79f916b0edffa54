"""Tiles: where they lie, how they blend, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qvgen_jax.autoencoders.tiling import Tiling, run_tiles
from qvgen_jax.errors import UserError

TILING = Tiling(8, 12, stride_height=6, stride_width=8)


def run(network, x, inputs=TILING):
    return jax.jit(lambda x: run_tiles(network, x, inputs, TILING))(x)


@pytest.mark.parametrize("size", [(5, 9), (9, 12), (20, 29)])
def test_tiles_of_the_identity_give_the_frame_back(size):
    x = np.random.default_rng(0).standard_normal((2, 3, *size, 2)).astype(np.float32)
    np.testing.assert_allclose(run(lambda x: x, x), x, rtol=1e-6)


def test_a_frame_no_larger_than_a_tile_runs_whole():
    shapes = []

    def network(x):
        shapes.append(x.shape)
        return x

    run(network, jnp.zeros((1, 1, 8, 12, 1)))  # Taller than a stride.
    assert shapes == [(1, 1, 8, 12, 1)]


def test_tiles_of_one_size_share_one_body():
    shapes = []

    def network(x):
        shapes.append(x.shape[2:4])
        return x

    run(network, jnp.zeros((1, 1, 26, 44, 1)))  # 5 x 6 tiles
    assert sorted(set(shapes)) == [(2, 4), (2, 12), (8, 4), (8, 12)]
    assert len(shapes) <= 2 * len(set(shapes))  # lax.map may trace twice


def test_a_tile_fades_in_linearly_over_the_one_before():
    x = jnp.zeros((1, 1, 8, 20, 1)).at[:, :, :, 12:].set(1.0)

    def last_pixel(x):
        return jnp.broadcast_to(x[:, :, :, -1:], x.shape)

    y = run(last_pixel, x)[0, 0, 0, :, 0]
    # The first tile (0 to 12) is 0, the second (8 to 20) is 1, the rest (16 to 20) is 1.
    np.testing.assert_allclose(y, [0] * 8 + [0, 0.25, 0.5, 0.75] + [1] * 8, rtol=1e-6)


def test_results_may_be_larger_than_their_tiles():
    latents = np.random.default_rng(0).standard_normal((1, 2, 7, 11, 1)).astype(np.float32)
    pixels = latents.repeat(2, axis=2).repeat(2, axis=3)

    def double(x):
        return jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)

    y = run(double, latents, TILING.divided(2))
    np.testing.assert_allclose(y, pixels, rtol=1e-6)


@pytest.mark.parametrize("stride", [0, 9])
def test_strides_larger_than_tiles_or_zero_are_refused(stride):
    with pytest.raises(UserError, match=f"height 8 and stride_height {stride}"):
        Tiling(8, 12, stride_height=stride, stride_width=8)


def test_tiles_that_do_not_fall_on_latent_pixels_are_refused_with_one_that_does():
    with pytest.raises(UserError, match=r"stride_width is 196; expected a multiple of 8.*192"):
        Tiling(256, 256, stride_height=192, stride_width=196).divided(8)
