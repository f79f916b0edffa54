"""A low-bit product over four TPUs: each multiplies its own rows, and nothing travels."""

import re
from functools import partial

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from kernels import tpu
from kernels.chips import CHIPS
from kernels.operands import Weight
from kernels.partition import over_rows
from tests.aot.test_attention_tpu import devices

INNER, COLUMNS = 1536, 8960


def test_each_chip_multiplies_its_own_rows():
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    chip_call = partial(
        tpu.quantize_and_matmul,
        bits=(4, 4),
        out_dtype=jnp.bfloat16,
        include_zero=True,
        clip_ratio=1.0,
        chip=CHIPS["v5e"],
    )

    def linear(x, clip, weight):
        rows = (x, clip, clip)
        return over_rows(
            lambda rows, whole: chip_call(*rows, *whole), rows, (jnp.float32(15), weight)
        )

    spread, whole = (NamedSharding(mesh, PartitionSpec(axes)) for axes in (("data", "model"), None))

    def like(sharding, dtype, *shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    vectors = [like(whole, jnp.float32, COLUMNS)] * 3
    weight = Weight(
        like(whole, jnp.int4, INNER, COLUMNS), *vectors, like(whole, jnp.float32, COLUMNS)
    )
    with jax.set_mesh(mesh):
        program = (
            jax.jit(linear)
            .lower(
                like(spread, jnp.bfloat16, 32768, INNER),
                like(spread, jnp.float32, 32768, 1),
                weight,
            )
            .compile()
        )
    text = program.as_text()
    assert "tpu_custom_call" in text
    assert f"bf16[8192,{COLUMNS}]" in text
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)
