"""The teacher of a run: full precision, in the least memory in which its answers are the same.

Or in less, with weights of a byte each (`train.teacher_weights=int8`), whose answers are nearly so.
"""

from collections.abc import Collection, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from qvgen_jax.mesh import AXES
from qvgen_jax.models import TransformerConfig, build_transformer, quantizable
from qvgen_jax.quant.byte_dense import ByteDense, kernel_as_bytes
from qvgen_jax.quant.dense import Dense
from qvgen_jax.sharding import parameter_sharding

# On the timestep's path.
_COMPUTED_IN_FLOAT32 = {
    "time_embedder",
    "time_proj",
    "time_embedding",
    "norm1",
    "norm2",
    "norm_out",
}


def byte_linears(train: Mapping, model: TransformerConfig) -> tuple[str, ...]:
    """Dotted names of the teacher's linears whose weights are a byte each.

    None, or all that do not compute in float32.

    Args:
        train: reads `teacher_weights`, "float" or "int8".
        model: the teacher.
    """
    if train["teacher_weights"] == "float":
        return ()
    return tuple(n for n in quantizable(model) if not _COMPUTED_IN_FLOAT32 & set(n.split(".")))


def teacher_definition(
    model: TransformerConfig, dtype: jnp.dtype, in_bytes: Collection[str] = ()
) -> nnx.GraphDef:
    """The full-precision network described, nothing allocated.

    Args:
        model: its sizes.
        dtype: that it computes in.
        in_bytes: see `byte_linears`.
    """

    def dense(name: str, *sizes: int, **arguments) -> nnx.Module:
        return (ByteDense if name in in_bytes else Dense)(name, *sizes, **arguments)

    teacher = nnx.eval_shape(
        lambda: build_transformer(
            model, key=jax.random.key(0), dense=dense, dtype=dtype, remat="none"
        )
    )
    return nnx.split(teacher)[0]


def as_held(teacher: dict, dtype: jnp.dtype, in_bytes: Collection[str] = ()) -> dict:
    """The teacher's parameters as a step needs them: kernels in the type that they multiply in.

    Half the memory in bfloat16, and the same predictions: its linears would narrow them anyway.
    Those on the timestep's path compute in float32, and stay. An array that is narrowed is deleted,
    one after the other: there is never a second teacher.

    Args:
        teacher: full-precision parameters.
        dtype: that the linears compute in.
        in_bytes: names of those that become codes and scales, see `byte_linears`.
    """

    def hold(node: dict, name: str) -> dict:
        held = {}
        for key, value in node.items():
            if isinstance(value, dict):
                held[key] = hold(value, f"{name}.{key}" if name else key)
            elif key != "kernel" or _COMPUTED_IN_FLOAT32 & set(name.split(".")):
                held[key] = value
            elif name in in_bytes:
                held |= _replaced(value, partial(_in_bytes, name))
            elif value.dtype != dtype:
                held |= _replaced(value, lambda kernel: {"kernel": kernel.astype(dtype)})
            else:
                held[key] = value
        return held

    return hold(teacher, "")


def held_in_training(config: Mapping, model: TransformerConfig, teacher: dict) -> dict:
    """`as_held` as the steps of a run want it.

    Args:
        config: reads `compute_dtype` and `train`.
        model: the teacher's sizes.
        teacher: full-precision parameters.
    """
    dtype = jnp.dtype(config["compute_dtype"])
    return as_held(teacher, dtype, byte_linears(config["train"], model))


def _replaced(kernel: jax.Array, narrow) -> dict[str, jax.Array]:
    narrowed = narrow(kernel)
    if isinstance(kernel, jax.Array) and not isinstance(kernel, jax.core.Tracer):
        jax.block_until_ready(narrowed)
        kernel.delete()
    return narrowed


def _in_bytes(name: str, kernel: jax.Array) -> dict[str, jax.Array]:
    at = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
    if not (isinstance(at, NamedSharding) and at.mesh.axis_names == AXES):
        return jax.jit(kernel_as_bytes)(kernel)
    return jax.jit(kernel_as_bytes, out_shardings=_places(name, kernel, at.mesh))(kernel)


def _places(name: str, kernel: jax.Array, mesh: Mesh) -> dict[str, NamedSharding]:
    shapes = jax.eval_shape(kernel_as_bytes, kernel)
    return {
        leaf: parameter_sharding(f"{name}.{leaf}", shape.shape, mesh)
        for leaf, shape in shapes.items()
    }
