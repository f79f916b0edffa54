"""Name table of CogVideoX's VAE: diffusers' `AutoencoderKLCogVideoX` against our nested dict.

Our tree has diffusers' structure, so names are read off the paths; what differs is written here.
"""

import jax
from flax import nnx

from convert.names import Entry
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAE, CogVideoXVAEConfig

_LAYOUTS = {4: "conv2d", 5: "conv3d"}


def name_table(config: CogVideoXVAEConfig) -> list[Entry]:
    """One entry per leaf of `CogVideoXVAE(config)`."""
    model = nnx.eval_shape(lambda: CogVideoXVAE(config, key=jax.random.key(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    kernels = {tuple(p.key for p in path[:-1]): x.ndim for path, x in leaves if x.ndim > 1}
    return [_entry(tuple(part.key for part in path), kernels) for path, _ in leaves]


def _entry(path: tuple[str, ...], kernels: dict[tuple[str, ...], int]) -> Entry:
    """The entry of one leaf; `kernels` holds each convolution's number of axes by its path."""
    parents, leaf = path[:-1], path[-1]
    axes = kernels.get(parents)
    # diffusers wraps causal convolutions; shortcuts and those within frames are bare.
    wrapped = axes == 5 and parents[-1] != "conv_shortcut"
    prefix = ".".join([*parents, "conv"] if wrapped else parents)
    if leaf == "kernel":
        return Entry(path, f"{prefix}.weight", _LAYOUTS[axes])
    return Entry(path, f"{prefix}.{'weight' if leaf == 'scale' else leaf}")
