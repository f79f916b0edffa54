"""The table of Hopper's tiles: what fits a multiprocessor, and which product gets which."""

import jax.numpy as jnp
import pytest

from kernels.hopper import check
from kernels.hopper_tiles import SHARED_BYTES, tiles
from kernels.operands import Product

PRODUCTS = {
    "wan14b_attention": Product(32_760, 5120, 5120),
    "wan14b_up_720p": Product(75_600, 5120, 13_824),
    "wan14b_down": Product(32_760, 13_824, 5120),
    "wan14b_text": Product(512, 5120, 5120),
    "wan1_3b_up": Product(32_760, 1536, 8960),
    "cogvideox_up": Product(17_776, 1920, 7680),
    "cogvideox_attention": Product(17_776, 1920, 1920),
    "one_token": Product(1, 256, 5120),
    "unknown_rows": Product(None, 5120, 5120),
    "last": Product(32_760, 1536, 64),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_tile_fits_shared_memory_and_registers(name):
    tile = tiles(PRODUCTS[name])
    # Counted by hand, so that the property cannot agree with itself: a ring of codes, two slabs of
    # 64 x 64 bytes for either warpgroup, three float32 vectors of rows and four of columns.
    ring = tile.stages * 128 * (tile.rows + tile.columns)
    vectors = 4 * (3 * tile.rows + 4 * tile.columns)
    assert tile.shared_bytes == ring + 2 * 2 * 64 * 64 + vectors
    assert tile.shared_bytes + 6 * 1024 <= SHARED_BYTES == 232_448
    # 232 registers a thread: what is left must hold a slab of the result and its vectors.
    assert tile.accumulators == tile.rows * tile.columns // 256 <= 128
    assert tile.stages >= 4


def test_large_products_take_the_tile_that_fetches_least():
    tile = tiles(PRODUCTS["wan14b_attention"])
    assert (tile.rows, tile.columns, tile.stages, tile.cluster) == (128, 256, 4, 2)


def test_columns_that_256_does_not_divide_take_narrower_tiles():
    # 15 tiles of 128 and no rest; 256 would leave a sixteenth of the work empty.
    assert tiles(PRODUCTS["cogvideox_attention"]).columns == 128
    assert tiles(PRODUCTS["last"]).columns == 64


def test_few_rows_are_spread_over_more_multiprocessors():
    narrow = tiles(PRODUCTS["one_token"])
    assert narrow.columns < 256
    # A second block below would find no rows at all.
    assert narrow.cluster == 1


def test_what_s8_cannot_hold_is_refused():
    check(Product(None, 5120, 5120, 8, 8, jnp.float32))
    with pytest.raises(NotImplementedError, match=r"W4A9 .*codes of 2 to 8 bits"):
        check(Product(None, 5120, 5120, act_bits=9))
    with pytest.raises(NotImplementedError, match=r"to float16: .*bfloat16 or float32"):
        check(Product(None, 5120, 5120, out_dtype=jnp.float16))
    with pytest.raises(NotImplementedError, match="int32 may overflow past 131071 inputs"):
        check(Product(None, 131_072, 64))
