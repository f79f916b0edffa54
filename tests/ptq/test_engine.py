"""Stages quantized one after the other: what the export's network says, and over eight devices."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert.packed import packed_definition
from qvgen_jax.errors import UserError
from qvgen_jax.models import quantizable
from qvgen_jax.ptq import engine
from qvgen_jax.ptq.engine import Plan, quantize_stages
from qvgen_jax.ptq.methods import METHODS, choices_of, quantization
from qvgen_jax.ptq.stages import in_batches, plain_network, predict
from qvgen_jax.quant.code_planes import packed_bytes
from qvgen_jax.quant.config import QuantConfig
from qvgen_jax.quant.named import with_layer
from qvgen_jax.quant.packed import unpack_layer
from tests.cpu_devices import ON_CPU
from tests.ptq.models import MODELS, inputs, random_params
from tests.test_sharding import PATIENT, ROOT

CALIBRATION = {
    "smoothing_points": 2,
    "branch_iterations": 1,
    "damping": 0.01,
    "by_activity": False,
    "rounding": "",
    "exponent": 0.0,
    "rank": 2,
}


def plan_of(model, method, bits=(8, 8), by_layer=None, **changes) -> Plan:
    config = {"calibration": CALIBRATION, "quant": {"symmetric_weights": False}}
    choices = choices_of(method, config)
    quant = quantization(QuantConfig(*bits, bits=by_layer or {}), choices)
    return Plan(model, quant, choices, jnp.float32, 16, 0, packed_definition, **changes)


def whole_network(plan, params, stages) -> tuple:
    """Params and definition of the packed transformer, put together as an export's reader does."""
    definition = packed_definition(plan.model, plan.quant, plan.dtype)
    for name in quantizable(plan.model):
        nodes = [
            unpack_layer(
                each.tensors[name],
                plan.quant.bits_of(name)[0],
                definition.inputs[name],
                definition.layouts[name],
            )
            for each in stages
            if name in each.tensors
        ]
        one = name.startswith("blocks.")
        node = {k: np.stack([n[k] for n in nodes]) if one else nodes[0][k] for k in nodes[0]}
        params = with_layer(params, name, node)
    return definition, params


@pytest.mark.parametrize(
    ("family", "method"),
    [
        pytest.param("wan", "svdquant", marks=pytest.mark.slow),
        pytest.param("cogvideox", "vidit_q", marks=pytest.mark.slow),
        pytest.param("wan", "vidit_q", marks=pytest.mark.by_hand),
        pytest.param("cogvideox", "svdquant", marks=pytest.mark.by_hand),
    ],
)
def test_at_eight_bits_the_quantized_transformer_says_what_it_said(family, method):
    model = MODELS[family]
    params, args = random_params(model), inputs(model)
    plan = plan_of(model, method)
    stages = list(quantize_stages(plan, params, in_batches(args, 2)))
    definition, packed = whole_network(plan, params, stages)
    network = nnx.merge(definition.graphdef, packed, definition.levels)
    found = jax.jit(lambda *x: network(*x))(*args)
    expected = predict(plain_network(model, jnp.float32), model, params, in_batches(args, 2), None)
    assert np.linalg.norm(found - expected) < 0.05 * np.linalg.norm(expected)
    assert all(each.errors[n]["output"] < 0.05 for each in stages for n in each.errors)


@pytest.mark.slow
def test_a_stage_that_is_found_is_run_and_not_quantized_again():
    model = MODELS["wan"]
    params, batches = random_params(model), in_batches(inputs(model), 2)
    plan = plan_of(model, "rtn_search", (3, 3))
    first = list(quantize_stages(plan, params, batches))
    there = {each.stage: each.tensors for each in first[:2]}
    again = list(quantize_stages(plan, params, batches, there.get))
    assert [sorted(each.seconds) for each in again[:2]] == [["run"]] * 2
    for one, other in zip(first, again, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one.tensors, other.tensors)


@pytest.mark.slow
def test_a_block_may_have_bits_of_its_own():
    model = MODELS["wan"]
    name, params = "blocks.ffn.up", random_params(model)
    plan = plan_of(model, "rtn", (3, 3), {"blocks.1.ffn.up": (8, 8)})
    stages = list(quantize_stages(plan, params, in_batches(inputs(model), 2)))
    blocks = [each for each in stages if each.stage.kind == "block"]
    inner = params["blocks"]["ffn"]["up"]["kernel"].shape[1]
    for each in blocks:
        bits = 8 if each.stage.index == 1 else 3
        assert each.tensors[name]["codes"].shape[1] == packed_bytes(inner, bits)
        # A step of 3 bits is 255 / 7 times one of 8.
        assert (each.errors[name]["output"] < 0.02) == (bits == 8)


def test_a_method_is_a_row_that_the_config_changes_where_it_says_so():
    config = {"calibration": CALIBRATION, "quant": {"symmetric_weights": True}}
    changed = config | {"calibration": CALIBRATION | {"rounding": "gptq", "exponent": 0.3}}
    assert choices_of("svdquant", config).rank == 2
    assert choices_of("gptq", config).rank == 0
    assert choices_of("smoothquant", changed).exponent == 0.3
    assert choices_of("svdquant", changed).rounding == "gptq"
    for method in METHODS:
        quant = quantization(QuantConfig.released(), choices_of(method, config))
        assert (quant.buckets, quant.clip_index) == (1, "bucket")
        assert (quant.branch_input == "tokens") == (method == "svdquant")


def test_a_linear_that_gptq_cannot_factorize_is_told(monkeypatch):
    model = MODELS["wan"]
    measure = engine.Observer.__call__

    def indefinite(self, *args):
        seen = measure(self, *args)
        return {
            name: each._replace(gram=each.gram.at[0, 1].mul(100)) for name, each in seen.items()
        }

    monkeypatch.setattr(engine.Observer, "__call__", indefinite)
    stages = quantize_stages(
        plan_of(model, "gptq"), random_params(model), in_batches(inputs(model), 4)
    )
    with pytest.raises(UserError, match=r"of embed came out as .*'output': nan.* raise --config"):
        next(stages)


@pytest.mark.by_hand
def test_over_eight_devices_the_codes_are_those_of_one():
    flags = [os.environ["XLA_FLAGS"], "--xla_force_host_platform_device_count=8", *PATIENT]
    # The number of devices is fixed when JAX starts: another process, not part of this run.
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/ptq/eight_devices.py"],
        cwd=ROOT,
        env=rest | ON_CPU | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
