"""A packed transformer's whole forward, compiled for an H200 that is not there.

What single kernels do not show: the products of few tokens, which go to XLA, and what XLA makes of
them beside the others.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("jax_cuda13_plugin", reason="JAX's CUDA plugin is not installed: jax[cuda13]")
pytest.importorskip("triton", reason="the quantizers in front of the products are Triton's")
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import SingleDeviceSharding

from convert.packed import packed_definition
from kernels.chips import CHIPS
from kernels.target import building_for
from qvgen_jax.models import text_only
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.quant.config import QuantConfig

sys.path.insert(0, str(Path(__file__).parent))
from cuda_topology import h200


@pytest.mark.parametrize(
    "model",
    [
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        pytest.param("zai-org/CogVideoX-2b", marks=pytest.mark.slow),
    ],
)
def test_one_layer_of_a_packed_model_compiles_with_its_kernels(model):
    device = SingleDeviceSharding(h200())
    config = dataclasses.replace(PUBLISHED[model], num_layers=1)
    quant = QuantConfig(4, 4, rank=0, single_clip=text_only(config))
    wan = isinstance(config, WanConfig)
    latents = (1, 21, 60, 104, 16) if wan else (1, 13, 60, 90, 16)
    text = (1, 512, config.text_dim) if wan else (1, 226, config.text_embed_dim)

    def put(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=device)

    with building_for(CHIPS["h200"]):
        packed = packed_definition(config, quant, jnp.dtype(jnp.bfloat16))
        states = jax.tree.map(lambda x: put(x.shape, x.dtype), (packed.shapes, packed.levels))
        inputs = put(latents, jnp.bfloat16), put((1,), jnp.float32), put(text, jnp.bfloat16)

        def forward(states, *inputs):
            return nnx.merge(packed.graphdef, *states)(*inputs)

        lowered = jax.jit(forward).trace(states, *inputs).lower(lowering_platforms=("cuda",))
        program = lowered.compile({"xla_gpu_autotune_level": 0}).as_text()
    assert "mosaic_gpu" in program  # The products.
    assert "triton_kernel_call" in program  # The quantizers.
    assert "__cudnn$fmhaSoftmax" in program
