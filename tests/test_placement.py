"""Shardings matched with parameters; `four_devices.py` then loads with them on four devices."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from qvgen_jax.errors import UserError
from qvgen_jax.placement import for_models, with_shardings
from tests.cpu_devices import ON_CPU

ROOT = Path(__file__).parents[1]
MESH = AbstractMesh((2, 3), ("rows", "columns"))
LIKE = {
    "embed": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.bfloat16)},
    "blocks": {
        "up": {
            "kernel": jax.ShapeDtypeStruct((3, 6, 9), jnp.float32),
            "bias": jax.ShapeDtypeStruct((3, 9), jnp.float32),
        }
    },
}


def over(*axes: str | None) -> NamedSharding:
    return NamedSharding(MESH, PartitionSpec(*axes))


def specs(like: dict) -> dict:
    return jax.tree.map(lambda leaf: tuple(leaf.sharding.spec), like)


def test_one_sharding_stands_for_all_and_for_a_subtree():
    assert specs(with_shardings(LIKE, over())) == jax.tree.map(lambda _: (), LIKE)
    mixed = with_shardings(LIKE, {"embed": over("rows"), "blocks": over("columns")})
    layers = {"kernel": ("columns",), "bias": ("columns",)}
    assert specs(mixed) == {"embed": {"kernel": ("rows",)}, "blocks": {"up": layers}}
    assert mixed["embed"]["kernel"].dtype == jnp.bfloat16


def test_a_function_sees_shapes_and_types():
    def last(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        return over() if leaf.dtype == jnp.bfloat16 else over(*[None] * (leaf.ndim - 1), "columns")

    chosen = specs(with_shardings(LIKE, lambda like: jax.tree.map(last, like)))
    assert chosen["embed"]["kernel"] == ()
    assert chosen["blocks"]["up"] == {"kernel": (None, None, "columns"), "bias": (None, "columns")}


def test_without_shardings_nothing_is_asked_for():
    assert with_shardings(LIKE, None) is LIKE
    assert with_shardings(LIKE, lambda like: None) is LIKE


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ({"embed": over()}, "blocks.up.kernel [3, 6, 9] has none; blocks.up.bias [3, 9] has none"),
        (
            {"embed": over(), "block": over(), "blocks": {"up": over(), "down": over()}},
            "block is no parameter; blocks.down is no parameter; expected one",
        ),
        (PartitionSpec("rows"), "embed.kernel [4, 6] has P"),
        ({**LIKE, "embed": {"kernel": {"scale": over()}}}, "embed.kernel [4, 6] has {"),
    ],
)
def test_shardings_of_other_parameters_are_named(shardings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        with_shardings(LIKE, shardings)


@pytest.mark.parametrize(
    ("shardings", "message"),
    [
        ({"embed": over("columns"), "blocks": over()}, "embed.kernel [4, 6] by "),
        ({"embed": over(), "blocks": over(None, "rows")}, "blocks.up.bias [3, 9] by "),
        ({"embed": over(), "blocks": over(None, None, None)}, "blocks.up.bias [3, 9] by "),
        ({"embed": over(("rows", "columns")), "blocks": over()}, "embed.kernel [4, 6] by "),
    ],
)
def test_a_size_that_does_not_divide_is_named_with_its_sharding(shardings, message):
    end = r".* of the mesh \{'rows': 2, 'columns': 3\}; leave such an axis whole"
    with pytest.raises(UserError, match=re.escape(message) + end):
        with_shardings(LIKE, shardings)


@pytest.mark.parametrize("mesh", [MESH, Mesh(np.asarray(jax.devices()[:1]), ("rows",))])
def test_a_mesh_in_the_place_of_shardings_is_refused(mesh):
    for shardings in (mesh, for_models(mesh, None)):
        with pytest.raises(UserError, match=r"is the mesh .* give NamedSharding\(mesh, Part"):
            with_shardings(LIKE, shardings)


def test_shardings_without_devices_have_no_place_to_load_to():
    with pytest.raises(UserError, match=r"over AbstractMesh.* which has no devices"):
        with_shardings(LIKE, for_models({"embed": over(), "blocks": over()}, None))


def test_a_long_list_of_faults_is_cut():
    like = {str(i): jax.ShapeDtypeStruct((5,), jnp.float32) for i in range(9)}
    with pytest.raises(UserError, match=r"3 \[5\] by .* and 5 more; leave"):
        with_shardings(like, over("rows"))


@pytest.mark.slow
def test_loading_over_four_devices():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", **ON_CPU}
    # The number of devices is fixed when JAX starts: another process, not part of this run.
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/four_devices.py"],
        cwd=ROOT,
        env=rest | flags | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
