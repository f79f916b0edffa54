"""The teacher in the memory of a step: the same answers, or nearly, with weights of a byte."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.models import quantizable
from qvgen_jax.quant.byte_dense import kernel_as_bytes
from qvgen_jax.quant.named import layer_at
from qvgen_jax.training.teacher import as_held, byte_linears, teacher_definition
from tests.ptq.models import MODELS, inputs, random_params

IN_BYTES = {"teacher_weights": "int8"}


@pytest.mark.parametrize("family", MODELS)
def test_a_teacher_of_bytes_says_nearly_what_the_whole_one_says(family):
    model, dtype = MODELS[family], jnp.dtype("float32")
    in_bytes = byte_linears(IN_BYTES, model)

    def answer(names: tuple[str, ...]) -> jax.Array:
        params = as_held(jax.tree.map(jnp.asarray, random_params(model)), dtype, names)
        return nnx.merge(teacher_definition(model, dtype, names), params)(*inputs(model))

    whole, held = answer(()), answer(in_bytes)
    error = float(jnp.linalg.norm(held - whole) / jnp.linalg.norm(whole))
    # 127 steps to the largest of a channel's weights, of some 32 normal ones: 0.5 % of a product.
    assert 1e-4 < error < 0.02


@pytest.mark.parametrize("family", MODELS)
def test_only_what_computes_in_float32_keeps_its_kernel(family):
    model = MODELS[family]
    in_bytes = byte_linears(IN_BYTES, model)
    given = jax.tree.map(jnp.asarray, random_params(model))
    kernels = {name: layer_at(given, name)["kernel"] for name in quantizable(model)}
    held = as_held(given, jnp.dtype("bfloat16"), in_bytes)
    assert byte_linears({"teacher_weights": "float"}, model) == ()
    assert len(in_bytes) > len(kernels) // 2
    for name, kernel in kernels.items():
        layer = layer_at(held, name)
        if name in in_bytes:
            assert (layer["codes"].shape, layer["codes"].dtype) == (kernel.shape, jnp.int8)
            assert layer["scale"].shape == (*kernel.shape[:-2], kernel.shape[-1])
            assert kernel.is_deleted()  # Never a second teacher.
        else:
            assert layer["kernel"].dtype == jnp.float32


def test_a_channels_largest_weight_is_exact_and_the_others_are_half_a_step_off():
    kernel = np.random.default_rng(0).normal(size=(3, 40, 6)).astype(np.float32)
    kernel[1, :, 2] = 0
    held = jax.device_get(kernel_as_bytes(jnp.asarray(kernel)))
    back = held["codes"] * held["scale"][..., None, :]
    assert np.abs(back - kernel).max() <= 0.5001 * held["scale"].max()
    assert (np.abs(held["codes"]).max(1) == np.where(held["scale"] > 0, 127, 0)).all()
    assert (back[1, :, 2] == 0).all()
