"""Rules from parameters to axes; `eight_devices.py` then trains and samples over eight devices."""

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES, make_mesh, mesh_to_generate
from qvgen_jax.models import abstract_params
from qvgen_jax.models.published import PUBLISHED
from qvgen_jax.sharding import parameter_sharding, spec_of
from tests.cpu_devices import ON_CPU

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("tensor", [1, 4])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_parameter_of_the_published_models_has_a_rule_that_divides(name, tensor):
    """Over 64 devices of fsdp each has a 64th, but for vectors; over tensor most divide further."""
    mesh = jax.sharding.AbstractMesh((1, 64, 1, tensor), AXES)
    here = whole = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(PUBLISHED[name])):
        path = ".".join(part.key for part in path)
        here += math.prod(parameter_sharding(path, leaf.shape, mesh).shard_shape(leaf.shape))
        whole += leaf.size
    assert whole / (64 * tensor) <= here < whole / 64 + 5_000_000


def test_a_stacked_layer_keeps_its_first_axis_whole():
    assert spec_of("blocks.ffn.up.kernel") == (None, "fsdp", "tensor")
    assert spec_of("blocks.ffn.down.kernel") == (None, "tensor", "fsdp")
    assert spec_of("blocks.ffn.down.bias") == (None, "fsdp")
    assert spec_of("proj_out.R") == (None, "fsdp")
    assert spec_of("blocks.attn1.norm_q.scale") == (None,)


@pytest.mark.parametrize(
    ("slices", "across", "message"),
    [
        (2, {}, "data=1, fsdp=1, and .* of 2 slices: .*data=2 .*fsdp=1, or .*data=1 .*fsdp=2"),
        (1, {"data": 2}, "data=2, fsdp=1, and the 8 devices are of 1 slice: .*data=1 .*fsdp=1$"),
        (4, {"fsdp": 2}, "data=1, fsdp=2, and .* of 4 slices: .*data=4 .*fsdp=1, or .*fsdp=4"),
    ],
)
def test_slices_of_a_tpu_that_the_mesh_does_not_name_are_told(slices, across, message):
    devices = [SimpleNamespace(platform="tpu", slice_index=n * slices // 8) for n in range(8)]
    with pytest.raises(UserError, match=message):
        make_mesh({"fsdp": -1}, across_slices=across, devices=devices)


def test_videos_over_several_slices_are_refused():
    devices = [SimpleNamespace(platform="tpu", slice_index=n // 4) for n in range(8)]
    with pytest.raises(UserError, match="of 2 slices, and a video is made within one"):
        mesh_to_generate(devices)


# Eight devices on two cores wait for each other longer than XLA has patience for.
PATIENT = [f"--xla_cpu_collective_{which}timeout_seconds=600" for which in ("", "call_terminate_")]


@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param("wan and alone-fsdp8", marks=pytest.mark.by_hand),
        pytest.param("cogvideox and context2-tensor4", marks=pytest.mark.slow),
        pytest.param("(wan and beside) or bytes or rotated or measures", marks=pytest.mark.slow),
        pytest.param("one_video or told or default_mesh or axes", marks=pytest.mark.by_hand),
        pytest.param("alone or pair or beside or run_over", marks=pytest.mark.by_hand),
    ],
)
def test_over_eight_devices(chosen):
    """Every axis alone and in pairs takes half an hour of one core: by hand."""
    flags = [os.environ["XLA_FLAGS"], "--xla_force_host_platform_device_count=8", *PATIENT]
    # The number of devices is fixed when JAX starts: another process, not part of this run.
    rest = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/eight_devices.py"]
    done = subprocess.run(
        [*command, "-k", chosen],
        cwd=ROOT,
        env=rest | ON_CPU | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
