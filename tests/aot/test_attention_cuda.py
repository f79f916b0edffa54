"""cuDNN's attention, compiled for an H200 that is not there.

XLA's part only: cuDNN itself makes its plan when it sees the GPU.
"""

import os
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_cuda13_plugin", reason="JAX's CUDA plugin is not installed: jax[cuda13]")

# There is no GPU whose libraries could be checked, or on which algorithms could be timed.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from kernels import attention_cudnn, attention_xla

sys.path.insert(0, str(Path(__file__).parent))
from cuda_topology import h200

# tokens, keys, heads, head_dim
SHAPES = {
    "Wan-14B": (32760, 32760, 40, 128),
    "Wan-14B to text": (32760, 512, 40, 128),
    "CogVideoX-2B": (17776, 17776, 30, 64),
    "odd": (17777, 513, 30, 64),
}
NO_TIMING = {"xla_gpu_autotune_level": 0}


@pytest.fixture(scope="module")
def device():
    return SingleDeviceSharding(h200())


def compiled(function, device, tokens, keys, heads, dim):
    """Forward and backward: its result, and the gradients of query, key and value."""

    def both(query, key, value, out):
        y, pull = jax.vjp(function, query, key, value)
        return y, pull(out)

    arguments = [
        jax.ShapeDtypeStruct((1, n, heads, dim), jnp.bfloat16, sharding=device)
        for n in (tokens, keys, keys, tokens)
    ]
    traced = jax.jit(both).trace(*arguments)
    return traced.lower(lowering_platforms=("cuda",)).compile(NO_TIMING)


@pytest.mark.parametrize("name", SHAPES)
def test_one_call_to_cudnn_forward_and_one_backward_hold_no_score_matrix(device, name):
    tokens, keys, heads, dim = SHAPES[name]
    program = compiled(attention_cudnn.attention, device, tokens, keys, heads, dim)
    calls = re.findall(r'custom_call_target="(__cudnn[^"]*)"', program.as_text())
    assert sorted(calls) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    # The softmax's float32 statistic, a number a token and head (5 MB at Wan-14B), and of odd
    # lengths the padded copies. cuDNN's own work space is not in it.
    copies = 8 * (tokens + keys) * heads * dim * 2 if tokens % 2 or keys % 2 else 0
    assert program.memory_analysis().temp_size_in_bytes < 2 * 4 * tokens * heads + copies


def test_the_chunks_hold_no_score_matrix_of_a_head_either(device):
    tokens, keys, heads, dim = SHAPES["Wan-14B"]
    program = compiled(
        lambda *x: attention_xla.attention(*x, by_head=False), device, tokens, keys, heads, dim
    )
    # All heads of 128 queries at a time, where the scores of all would be 172 GB.
    assert program.memory_analysis().temp_size_in_bytes < 8e9
