"""A pipeline's autoencoder and text encoder with their parameters, as jitted calls.

Compilation is cached as `transformer` says.
"""

import hashlib
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.autoencoders import cogvideox as cogvideox_vae
from qvgen_jax.autoencoders import wan as wan_vae
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.tiling import Tiling
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.errors import UserError
from qvgen_jax.placement import run_where
from qvgen_jax.text.t5 import T5Config
from qvgen_jax.transformer import Transformer


@dataclass(frozen=True, eq=False)
class VAE:
    """A video autoencoder; latents here are the PyTorch VAE's own, not normalised."""

    config: WanVAEConfig | CogVideoXVAEConfig
    graphdef: nnx.GraphDef
    states: tuple[dict, ...]

    def encode(self, video: jax.Array, tiling: Tiling | bool = False) -> jax.Array:
        """The posterior mean, float32 `[b, 1 + n, H/8, W/8, z]`, of video `[b, 1 + 4n, H, W, 3]`.

        Args:
            tiling: tiles in space, which need less memory; True for diffusers' `enable_tiling()`.

        Raises:
            UserError: the video is not float in [-1, 1], or its size does not divide.
        """
        return self.posterior(video, tiling)[0]

    def posterior(
        self, video: jax.Array, tiling: Tiling | bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and log-variance, not normalised."""
        if video.ndim != 5 or not jnp.issubdtype(video.dtype, jnp.floating):
            raise UserError(
                f"video is {video.dtype} {list(video.shape)}, expected float in [-1, 1] of "
                "[batch, frames, height, width, 3]; for uint8 frames pass frames / 127.5 - 1"
            )
        return _encode(self.graphdef, self._tiles(tiling), self.states, jnp.asarray(video))

    def decode(self, latents: jax.Array, tiling: Tiling | bool = False) -> jax.Array:
        """Video float32 in [-1, 1], `[b, 1 + 4n, 8h, 8w, 3]`, of latents `[b, 1 + n, h, w, z]`.

        Where n is odd, CogVideoX's VAE gives three frames more.
        """
        return _decode(self.graphdef, self._tiles(tiling), self.states, jnp.asarray(latents))

    def normalize(self, mean: jax.Array, logvar: jax.Array | None = None):
        """To the transformer's space; with `logvar`, both."""
        return self._family.normalize(self.config, mean, logvar)

    def denormalize(self, latents: jax.Array) -> jax.Array:
        """From the transformer's space."""
        return self._family.denormalize(self.config, latents)

    @property
    def frame_unit(self) -> int:
        """A video of 1 plus a multiple of this comes back with as many frames."""
        # CogVideoX's VAE works on pairs of latent frames, and a lone one after others becomes four.
        pairs = 1 if self._family is wan_vae else 2
        return pairs * self.config.temporal_factor

    @property
    def _family(self) -> ModuleType:
        return wan_vae if isinstance(self.config, WanVAEConfig) else cogvideox_vae

    def _tiles(self, tiling: Tiling | bool) -> Tiling | None:
        return (self.config.default_tiling if tiling is True else tiling) or None


@partial(jax.jit, static_argnums=(0, 1))
def _encode(graphdef, tiling, states, video):
    return nnx.merge(graphdef, *states).encode(video, tiling)


@partial(jax.jit, static_argnums=(0, 1))
def _decode(graphdef, tiling, states, latents):
    return nnx.merge(graphdef, *states).decode(latents, tiling)


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """A T5 or UMT5 encoder, with weights in float or in int8."""

    config: T5Config
    graphdef: nnx.GraphDef
    states: tuple[dict, ...]

    def __call__(self, token_ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Hidden states `[batch, tokens, d_model]` of int32 ids; zero wherever the mask is.

        A mask of ones is PyTorch's CogVideoX, whose text has none.
        """
        ids, mask = jnp.asarray(token_ids), jnp.asarray(mask)
        return run_where(partial(_encode_text, self.graphdef), self.states, ids, mask)


@partial(jax.jit, static_argnums=0)
def _encode_text(graphdef, states, token_ids, mask):
    hidden = nnx.merge(graphdef, *states)(token_ids, mask)
    return jnp.where(mask[..., None] > 0, hidden, jnp.zeros((), hidden.dtype))


def fingerprint(*networks: Transformer | VAE | TextEncoder) -> str:
    """Changes with the networks' configuration or weights, not with time.

    Of each array the first 4096 elements are read: retrained weights differ everywhere.
    """
    digest = hashlib.sha256()
    for network in networks:
        digest.update(repr(network.config).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(network.states):
            digest.update(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}".encode())
            digest.update(np.asarray(leaf.ravel()[:4096]).tobytes())
    return digest.hexdigest()[:16]
