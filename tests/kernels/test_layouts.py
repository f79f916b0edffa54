"""Every layout holds the same codes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.layouts import LAYOUTS, container, laid_out_shape, lay_out, unlay


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("inner", [6, 7, 1])
@pytest.mark.parametrize("bits", [3, 4])
def test_a_layout_gives_back_the_codes(layout, inner, bits):
    half = 2 ** (bits - 1)
    codes = jax.random.randint(jax.random.key(inner), (2, inner, 5), -half, half, jnp.int8)
    laid = lay_out(codes, bits, layout)
    assert laid.dtype == container(bits, layout)
    assert laid.shape == (2, *laid_out_shape(inner, 5, layout))
    np.testing.assert_array_equal(unlay(laid, inner, layout), codes)
    np.testing.assert_array_equal(lay_out(np.asarray(codes), bits, layout), laid)


def test_halves_take_half_the_bytes_of_the_codes():
    assert laid_out_shape(5120, 13824, "rows_halved") == (2560, 13824)
    assert container(4, "columns_halved").itemsize == 1


def test_eight_bit_codes_do_not_fit_in_halves():
    with pytest.raises(ValueError, match=r"8-bit codes do not fit layout 'rows_halved'"):
        lay_out(jnp.zeros((4, 4), jnp.int8), 8, "rows_halved")


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"'tiled'; expected one of rows, columns"):
        container(4, "tiled")
