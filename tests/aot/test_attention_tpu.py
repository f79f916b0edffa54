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

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
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


def score_matrices(text, tokens, keys):
    """Arrays in a compiled program with at least so many rows and columns, or transposed."""
    shapes = {
        tuple(sorted(int(n) for n in shape.split(",")))[-2:]
        for shape in re.findall(r"(?:bf16|f32|pred)\[([\d,]+,[\d,]+)\]", text)
    }
    small, large = sorted((tokens, keys))
    # The channels of all heads, too, are many: 5120 beside the tokens is no score matrix.
    return [s for s in shapes if s[0] >= small and s[1] >= large] if small > 6000 else []


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_one_kernel_forward_and_two_backward_hold_no_score_matrix(chip, name):
    tokens, keys, heads, dim = SHAPES[name]
    sharding = SingleDeviceSharding(devices(chip)[0])
    program = compiled(attention_splash.attention, sharding, tokens, keys, heads, dim)
    text = program.as_text()
    assert text.count(KERNEL) == 3
    assert not score_matrices(text, tokens, keys)
    # A dozen arrays as large as the queries, whose channels lie in rows of 128: 4.0 GB at Wan-14B,
    # where the scores of all heads would be 172 GB; to text 2.7 GB, and then their gradients.
    queries = tokens * heads * 128 * 2
    print(chip, name, program.memory_analysis().temp_size_in_bytes / queries)
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
    assert re.search(rf"bf16\[1,20,32768,128\]\S* {KERNEL}|bf16\[1,20,32768,128\]", text)


def test_one_video_is_spread_over_its_heads():
    # Tokens arrive in slices; four chips have ten heads each, and exchange, instead of one all.
    mesh = Mesh(np.array(devices("v5e")), ("model",), (AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec(None, "model"))
    with jax.set_mesh(mesh):
        program = compiled(attention_splash.attention, sharding, *SHAPES["Wan-14B"])
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
    assert not score_matrices(program.as_text(), tokens, keys)
    assert program.memory_analysis().temp_size_in_bytes < 8e9
