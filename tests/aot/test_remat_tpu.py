"""What policies of recomputing make of splash attention in a scan, compiled for a TPU."""

import os

import pytest

pytest.importorskip("libtpu", reason="libtpu is not installed: jax[tpu]")

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from kernels.attention import attention
from kernels.chips import named
from kernels.target import building_for
from kernels.tpu_ahead import ALONE
from qvgen_jax.models.remat import recomputed

for name, value in ALONE.items():  # Read when libtpu starts.
    os.environ.setdefault(name, value)

LAYERS, TOKENS, HEADS, DIM = 8, 2048, 8, 128
ARRAY = TOKENS * HEADS * DIM * 2  # Bytes.
KERNEL = 'custom_call_target="tpu_custom_call"'


def compiled(policy):
    def loss(x, stack):
        def body(x, kernel):
            q = (x @ kernel).reshape(1, TOKENS, HEADS, DIM)
            return x + attention(q, q, q).reshape(x.shape), None

        y, _ = jax.lax.scan(recomputed(body, policy), x, stack)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    shapes = (1, TOKENS, HEADS * DIM), (LAYERS, HEADS * DIM, HEADS * DIM)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=SingleDeviceSharding(device))
        for shape in shapes
    ]
    with building_for(named("v5e")):
        return jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()


def test_kept_attention_does_not_run_again_and_repeated_attention_is_not_kept():
    kept, repeated = compiled("attention"), compiled("blocks")
    # Forward once, and two kernels backward; or forward twice.
    assert kept.as_text().count(KERNEL) == 3
    assert repeated.as_text().count(KERNEL) == 4
    more = kept.memory_analysis().temp_size_in_bytes - repeated.memory_analysis().temp_size_in_bytes
    assert more > 0.7 * LAYERS * ARRAY


def test_offloaded_activations_wait_on_the_host():
    memory = compiled("offload").memory_analysis()
    # Of every layer the input and the attention's result.
    assert memory.host_temp_size_in_bytes >= 2 * LAYERS * ARRAY
    assert memory.temp_size_in_bytes < LAYERS * ARRAY
