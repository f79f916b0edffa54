"""The real training step, and low-bit inference, compiled for chips that are not here.

Nothing is allocated.

For a TPU that takes libtpu, for a GPU jax's CUDA plugin; both are in the extra `aot`.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kernels.tpu_ahead import ALONE
from qvgen_jax.errors import UserError
from qvgen_jax.plan.collectives import Collective, collectives
from qvgen_jax.plan.gpus import DESCRIBED, description
from qvgen_jax.plan.target import Target, parse_target

_PACKAGES = {"tpu": "libtpu", "gpu": "jax_cuda13_plugin"}
_GPU = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # It would need the chip.
}
# The compilers allocate without end: an eighth less of their time with huge pages.
_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


class Compiled(NamedTuple):
    """What a compiler says of a program, of each device.

    Attributes:
        arguments: bytes of a step's state, teacher and batch; of inference, the packed model's.
        outputs: bytes of the new state and the metrics, or of the velocity.
        aliased: of them, what takes the place of arguments.
        temporaries: bytes beyond both, with the gaps between them.
        peak: bytes that are alive at once, without those gaps.
        lower_seconds: that tracing took here.
        seconds: that compiling took here.
        collectives: what travels between devices in a step.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    peak: int
    lower_seconds: float
    seconds: float
    collectives: tuple[Collective, ...]

    @property
    def laid_out(self) -> int:
        """Bytes that the step takes of a device's memory."""
        return self.arguments + self.outputs - self.aliased + self.temporaries


class Refused(NamedTuple):
    """Why there is no compiled step."""

    reason: str


def compiler_for(target: Target) -> str | None:
    """The package that compiles for the target; None if it is not installed, or cannot."""
    if target.chip.platform == "gpu" and target.chip.name not in DESCRIBED:
        return None
    package = _PACKAGES.get(target.chip.platform)
    if package and importlib.util.find_spec(package):
        return package
    return None


def compile_step(
    config: Mapping,
    target: Target,
    sizes: Mapping[str, int],
    timeout: float | None = None,
    *,
    program: str = "step",
) -> Compiled | Refused:
    """Lowers and compiles in a process of its own, which a compiler's settings and memory need.

    Args:
        config: of the run, plain dicts.
        target: not this machine.
        sizes: of the mesh's axes.
        timeout: seconds after which to give up; never if None.
        program: "step" of training, "measuring" of the teacher before the first one, or "forward"
            of the packed model.

    Returns:
        What came of it, or the compiler's reason: as a rule that the program does not fit.

    Raises:
        UserError: no compiler for the target is installed.
    """
    if compiler_for(target) is None:
        raise UserError(
            f"no compiler for {target.chip.name} is installed here; pip install 'qvgen-jax[aot]' "
            "has those for TPUs and GPUs"
        )
    environment = {**_PAGES, **(ALONE if target.chip.platform == "tpu" else _GPU)}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps([config, target.name, dict(sizes), program]))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "qvgen_jax.plan.ahead", str(asked), str(answer)],
                env={**os.environ, **environment},
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired:
            return Refused(f"the compiler had not ended after {timeout:.0f} s")
        if not answer.is_file():
            return Refused(f"the compiler's process died:\n{done.stderr[-3000:]}")
        found = json.loads(answer.read_text())
    if "reason" in found:
        return Refused(found["reason"])
    moved = tuple(Collective(*each) for each in found.pop("collectives"))
    return Compiled(**found, collectives=moved)


def lower_step(config: Mapping, target: Target, sizes: Mapping[str, int]) -> Any:
    """The step of the phase with the branch, as `jax.stages.Lowered`.

    Raises:
        UserError: see `qvgen_jax.sharding`.
    """
    import jax

    from kernels.target import building_for
    from qvgen_jax.plan.shapes import arguments, read_run, scheduler_of
    from qvgen_jax.training.loop import compile_step, make_recipe

    run, mesh = read_run(config), _training_mesh(config, target, sizes)
    recipe = make_recipe(
        config, run.model, scheduler_of(run.model), branch=config["quant"]["rank"] > 0
    )
    with building_for(target.chip), jax.set_mesh(mesh):
        state, *rest = arguments(run, mesh)
        step = compile_step(recipe, jax.tree.map(lambda x: x.sharding, state))
        return step.lower(state, *rest)


def lower_measuring(config: Mapping, target: Target, sizes: Mapping[str, int]) -> Any:
    """What the teacher says of a batch before step 0, for smoothing, as `jax.stages.Lowered`.

    Raises:
        UserError: see `qvgen_jax.sharding`.
    """
    import jax

    from kernels.target import building_for
    from qvgen_jax.models import abstract_params
    from qvgen_jax.plan.shapes import arguments, read_run, scheduler_of
    from qvgen_jax.sharding import described
    from qvgen_jax.training.calibrate import measuring_step

    run, mesh = read_run(config), _training_mesh(config, target, sizes)
    measure = measuring_step(config, run.model, scheduler_of(run.model))
    with building_for(target.chip), jax.set_mesh(mesh):
        _, batch, _, *rest = arguments(run, mesh)
        teacher = described(abstract_params(run.model), mesh)
        return jax.jit(measure).lower(teacher, batch, *rest)


def _training_mesh(config: Mapping, target: Target, sizes: Mapping[str, int]) -> Any:
    from qvgen_jax.mesh import make_mesh

    across = config["mesh"]["across_slices"] if target.slices > 1 else {}
    inner = {axis: size // across.get(axis, 1) for axis, size in sizes.items()}
    return make_mesh(inner, across_slices=across, devices=devices(target))


def lower_forward(config: Mapping, target: Target, sizes: Mapping[str, int]) -> Any:
    """One call of the packed transformer as sampling makes it, as `jax.stages.Lowered`.

    One video of the config's size, with and without its prompt; weights as an export of the run
    lies in memory, cut as `qvgen_jax.load` cuts them.

    Raises:
        UserError: see `qvgen_jax.sharding`.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from convert.packed import packed_definition
    from kernels.target import building_for
    from qvgen_jax import sharding
    from qvgen_jax.mesh import make_mesh
    from qvgen_jax.plan.shapes import read_run, video_and_text
    from qvgen_jax.training.student import quant_config

    run = read_run(config)
    mesh = make_mesh(sizes, devices=devices(target))
    quant = quant_config({**config["quant"], "rank": 0}, run.model)
    dtype = jnp.dtype(config["compute_dtype"])
    packed = packed_definition(run.model, quant, dtype, chip=target.chip)
    whole = sharding.whole(mesh)

    def placed(x: Any, at: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at)

    params = jax.tree.map(placed, packed.shapes, sharding.shard(packed.shapes, mesh))
    levels = jax.tree.map(lambda x: placed(x, whole), packed.levels)
    latents, text = (
        jax.ShapeDtypeStruct((2, *shape), dtype, sharding=whole) for shape in video_and_text(run)
    )
    timesteps = jax.ShapeDtypeStruct((2,), jnp.float32, sharding=whole)

    def forward(params: dict, levels: dict, *inputs: jax.Array) -> jax.Array:
        return nnx.merge(packed.graphdef, params, levels)(*inputs)

    with building_for(target.chip), jax.set_mesh(mesh):
        return jax.jit(forward).lower(params, levels, latents, timesteps, text)


_PROGRAMS = {"step": lower_step, "measuring": lower_measuring, "forward": lower_forward}


def devices(target: Target) -> Sequence[Any]:
    """The target's; those that are not here can be compiled for and run nothing."""
    import jax
    from jax.experimental import topologies

    if target.here:
        return jax.devices()
    if target.chip.platform == "tpu":
        how: dict[str, Any] = {"chips_per_host_bounds": [1, 1, 1]} if target.chips == 1 else {}
        if target.slices > 1:
            how["num_slices"] = target.slices
        name = target.of_a_slice
        return topologies.get_topology_desc(platform="tpu", topology_name=name, **how).devices
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=target.chip.name,
        topology=f"1x1x{target.devices}",
        target_config=description(target.chip),
    )
    return described.devices


def measure(lowered: Any, lower_seconds: float = 0.0) -> Compiled:
    """Compile, and read what the compiler knows of memory and of what travels."""
    start = time.perf_counter()
    compiled = lowered.compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        lower_seconds=lower_seconds,
        seconds=seconds,
        collectives=tuple(collectives(compiled.as_text())),
    )


def _main(asked: str, answer: str) -> None:
    config, name, sizes, program = json.loads(Path(asked).read_text())
    start = time.perf_counter()
    lowered = _PROGRAMS[program](config, parse_target(name), sizes)
    try:
        found = measure(lowered, time.perf_counter() - start)._asdict()
    except Exception as reason:  # The compilers' refusals have no type of their own.
        found = {"reason": f"{type(reason).__name__}: {reason}"}
    Path(answer).write_text(json.dumps(found))


if __name__ == "__main__":
    _main(*sys.argv[1:])
