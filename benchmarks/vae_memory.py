"""Peak memory of decoding a video, read off the compiled program; nothing is run.

    pip install -c constraints.txt -e .
    JAX_PLATFORMS=cpu python benchmarks/vae_memory.py
    pip install 'jax[tpu]' && python benchmarks/vae_memory.py --tpu v5e:2x2

With `--tpu` the program is compiled for one chip of that topology, which need not be there. A row
is a VAE of a published model, how the clip is cut, and the type it computes in.
"""

import argparse
import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Sharding, SingleDeviceSharding

from qvgen_jax.autoencoders.causal import Past
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAE, CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and the latents of the clip it decodes."""

    build: Callable[[jnp.dtype], WanVAE | CogVideoXVAE]
    latents: tuple[int, ...]


CASES = {
    "Wan 2.1, 81 x 480 x 832": Case(
        lambda dtype: WanVAE(WanVAEConfig(), key=jax.random.key(0), dtype=dtype),
        (1, 21, 60, 104, 16),
    ),
    "CogVideoX-2B, 49 x 480 x 720": Case(
        lambda dtype: CogVideoXVAE(CogVideoXVAEConfig(), key=jax.random.key(0), dtype=dtype),
        (1, 13, 60, 90, 16),
    ),
}
# One pass over a CogVideoX clip is another function (its group norms would see every frame), but
# as large as the model's.
CUTS = {
    "whole": lambda vae, x: jnp.clip(vae.decoder(x, Past()).astype(jnp.float32), -1.0, 1.0),
    "chunked": lambda vae, x: vae.decode(x),
    "chunked, tiled": lambda vae, x: vae.decode(x, vae.config.default_tiling),
}


def measure(case: Case, cut: Callable, dtype: jnp.dtype, sharding: Sharding) -> tuple[float, ...]:
    """GiB of weights and latents, of temporaries and of the video; seconds of compiling."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: case.build(dtype)), nnx.Param)

    def argument(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        held = dtype if x.ndim > 1 else jnp.float32
        return jax.ShapeDtypeStruct(x.shape, held, sharding=sharding)

    weights = jax.tree.map(argument, nnx.to_pure_dict(params))
    latents = jax.ShapeDtypeStruct(case.latents, jnp.float32, sharding=sharding)
    decode = jax.jit(lambda p, x: cut(nnx.merge(graphdef, p), x))
    start = time.monotonic()
    memory = decode.lower(weights, latents).compile().memory_analysis()
    seconds = time.monotonic() - start
    parts = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes,
    )
    return (*(part / GIB for part in parts), seconds)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tpu", help="a topology to compile for, such as v5e:2x2")
    parser.add_argument("--model", default="", help="only models whose name contains this")
    parser.add_argument("--cut", choices=CUTS, action="append", help="only these")
    args = parser.parse_args()
    device = jax.devices()[0]
    if args.tpu:
        device = topologies.get_topology_desc(platform="tpu", topology_name=args.tpu).devices[0]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax")]
    print(f"{', '.join(versions)}, compiled for {device.device_kind} on {platform.platform()}\n")
    print(
        "| VAE and clip | cut | type | weights, latents | temporaries | video | peak | compiled |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, case in CASES.items():
        for cut in args.cut or CUTS:
            for dtype in (jnp.float32, jnp.bfloat16):
                if args.model not in name:
                    continue
                *parts, seconds = measure(case, CUTS[cut], dtype, SingleDeviceSharding(device))
                row = " | ".join(f"{gib:.2f}" for gib in (*parts, np.sum(parts)))
                print(f"| {name} | {cut} | {jnp.dtype(dtype)} | {row} GiB | {seconds:.0f} s |")


if __name__ == "__main__":
    main()
