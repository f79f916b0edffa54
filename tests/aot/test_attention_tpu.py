"""Splash attention, compiled by libtpu for chips that are not attached, at real shapes."""

import os
import re

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")

# No metadata server here, and other processes may hold the library too.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from kernels import attention_splash, attention_xla
from kernels.tpu_ahead import TOPOLOGIES

CHIPS = ("v5e", "v5p", "v6e")
# tokens, keys, heads, head_dim
SHAPES = {
    "Wan-14B": (32760, 32760, 40, 128),
    "Wan-14B to text": (32760, 512, 40, 128),
    "CogVideoX-2B": (17776, 17776, 30, 64),  # 226 of text among them.
}
KERNEL = 'custom_call_target="tpu_custom_call"'


def devices(chip):
    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices


def compiled(function, sharding, tokens, keys, heads, dim, *, batch=1, dtype=jnp.bfloat16):
    """Forward and backward: its result, and the gradients of query, key and value."""

    def both(query, key, value, out):
        y, pull = jax.vjp(function, query, key, value)
        return y, pull(out)

    arguments = [
        jax.ShapeDtypeStruct((batch, n, heads, dim), dtype, sharding=sharding)
        for n in (tokens, keys, keys, tokens)
    ]
    return jax.jit(both).lower(*arguments).compile()


def score_matrices(text, tokens):
    """Arrays in a compiled program with two axes of at least so many elements."""
    shapes = re.findall(r"\b[a-z]+\d*\[([\d,]+)\]", text)
    return [s for s in set(shapes) if sum(int(n) >= tokens for n in s.split(",")) > 1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", CHIPS)
def test_one_kernel_forward_and_two_backward_hold_no_score_matrix(chip, name):
    tokens, keys, heads, dim = SHAPES[name]
    sharding = SingleDeviceSharding(devices(chip)[0])
    program = compiled(attention_splash.attention, sharding, tokens, keys, heads, dim)
    text = program.as_text()
    assert text.count(KERNEL) == 3
    assert not score_matrices(text, tokens)
    # In arrays as large as the queries, whose channels lie in rows of 128: 6 to 10 are held, 4 GB
    # at most. The float32 scores would be keys / 64 more: 8 to text, 512 in Wan's self-attention.
    queries = tokens * heads * 128 * 2
    assert program.memory_analysis().temp_size_in_bytes < 12 * queries


def test_float32_fits_the_blocks_too():
    sharding = SingleDeviceSharding(devices("v5e")[0])
    shape = SHAPES["Wan-14B"]
    program = compiled(attention_splash.attention, sharding, *shape, dtype=jnp.float32)
    assert program.as_text().count(KERNEL) == 3


def test_under_a_mesh_each_chip_has_its_samples_and_heads_without_a_collective():
    mesh = Mesh(np.array(devices("v5e")).reshape(2, 2), ("data", "model"), (AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    with jax.set_mesh(mesh):
        program = compiled(
            attention_splash.attention, sharding, *SHAPES["Wan-14B to text"], batch=2
        )
    text = program.as_text()
    assert text.count(KERNEL) == 3
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)
    assert "bf16[1,20,32768,128]" in text


def test_one_video_is_spread_over_its_heads():
    # Tokens arrive in slices; four chips have ten heads each, and exchange, instead of one all.
    mesh = Mesh(np.array(devices("v5e")), ("model",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    with jax.set_mesh(mesh):
        program = compiled(attention_splash.attention, sharding, *SHAPES["Wan-14B to text"])
    text = program.as_text()
    assert text.count(KERNEL) == 3
    assert "all-to-all" in text
    assert "bf16[1,10,32768,128]" in text


def test_the_chunks_hold_no_score_matrix_of_a_head_either():
    # What v5e falls back to: all heads of 128 queries at a time. Its 16 GB hold that, and the
    # 4.3 GB of one head's scores would be 172 GB of them all.
    sharding = SingleDeviceSharding(devices("v5e")[0])
    tokens, keys, heads, dim = SHAPES["Wan-14B"]
    program = compiled(
        lambda *x: attention_xla.attention(*x, by_head=False), sharding, tokens, keys, heads, dim
    )
    assert not score_matrices(program.as_text(), tokens)
    assert program.memory_analysis().temp_size_in_bytes < 8e9
