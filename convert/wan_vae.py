"""Name table of Wan 2.1's VAE: diffusers' `AutoencoderKLWan` against our nested dict.

Our tree has diffusers' structure, so names are read off the paths; what differs is written here.
"""

import jax
from flax import nnx

from convert.names import Entry
from qvgen_jax.autoencoders.wan import WanVAE, WanVAEConfig

_LAYOUTS = {4: "conv2d", 5: "conv3d"}


def name_table(config: WanVAEConfig) -> list[Entry]:
    """One entry per leaf of `WanVAE(config)`."""
    model = nnx.eval_shape(lambda: WanVAE(config, key=jax.random.key(0)))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return [_entry(tuple(part.key for part in path), leaf.shape) for path, leaf in leaves]


def _entry(path: tuple[str, ...], shape: tuple[int, ...]) -> Entry:
    # PyTorch's `resample` is a sequence: padding or interpolation, then the convolution.
    *parents, leaf = ("resample.1" if part == "resample" else part for part in path)
    if leaf == "kernel":
        return Entry(path, ".".join([*parents, "weight"]), _LAYOUTS[len(shape)])
    name = ".".join([*parents, leaf])
    if leaf == "gamma":
        # Norms of frames broadcast over height and width, norms of clips over time too.
        ones = (1, 1) if "attentions" in parents else (1, 1, 1)
        return Entry(path, name, "flat", shape=(*shape, *ones))
    return Entry(path, name)
