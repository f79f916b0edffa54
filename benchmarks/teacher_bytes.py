"""How far off a teacher with weights of a byte is, beside one that computes in bfloat16.

    python benchmarks/teacher_bytes.py

The trained tiny pipeline on noise, by noise level: the mean squared error against full precision's
prediction by the variance of that.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import qvgen_jax
from qvgen_jax.evaluation.samples import read_prompts
from qvgen_jax.training.teacher import as_held, byte_linears, teacher_definition

SAMPLES = 16
TIMESTEPS = (900, 500, 100)


def main() -> None:
    """See the module."""
    pipe = qvgen_jax.load("assets/tiny_wan")
    model, params = pipe.transformer.config, pipe.transformer.states[0]
    text = pipe.encode_prompt(read_prompts("held_out", SAMPLES))
    shape = (SAMPLES, 5, 8, 8, model.in_channels)
    latents = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    in_bytes = byte_linears({"teacher_weights": "int8"}, model)

    def answer(dtype: str, names: tuple[str, ...], timestep: int) -> jax.Array:
        dtype = jnp.dtype(dtype)
        held = as_held(jax.tree.map(jnp.copy, params), dtype, names)
        teacher = nnx.merge(teacher_definition(model, dtype, names), held)
        return teacher(latents, jnp.full((SAMPLES,), float(timestep)), text).astype(jnp.float32)

    print("timestep  int8 weights  bfloat16")
    for timestep in TIMESTEPS:
        full = answer("float32", (), timestep)
        found = (answer("float32", in_bytes, timestep), answer("bfloat16", (), timestep))
        errors = [float(jnp.mean((each - full) ** 2) / jnp.var(full)) for each in found]
        print(f"{timestep:8d}  {errors[0]:12.4%}  {errors[1]:8.4%}")


if __name__ == "__main__":
    main()
