"""What a training step takes, as shapes: from a config alone, without weights or data."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from qvgen_jax import sharding
from qvgen_jax.autoencoders.cogvideox import CogVideoXVAEConfig
from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.data.clips import cut_of
from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.diffusion.schedulers import Scheduler
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import AXES
from qvgen_jax.models import TransformerConfig, abstract_params
from qvgen_jax.models.linears import video_tokens
from qvgen_jax.models.published import PUBLISHED, transformer_config
from qvgen_jax.models.wan import WanConfig
from qvgen_jax.training.loop import undrawn_state
from qvgen_jax.training.teacher import held_in_training

_PUBLISHED_FACTORS = (4, 8)


class Run(NamedTuple):
    """What a plan needs to know of a config, read once.

    Attributes:
        config: the whole of it, plain dicts.
        model: its transformer.
        factors: by which its VAE shrinks time and space.
    """

    config: Mapping
    model: TransformerConfig
    factors: tuple[int, int]

    @property
    def tokens(self) -> int:
        """Of one sample's video."""
        data = self.config["data"]
        size = data["num_frames"], data["height"], data["width"]
        return video_tokens(self.model, *size, self.factors)

    @property
    def text_tokens(self) -> int:
        """Of a prompt."""
        return self.config["data"]["max_length"]

    @property
    def block_tokens(self) -> int:
        """That a block sees of one sample."""
        joint = not isinstance(self.model, WanConfig)
        return self.tokens + joint * self.text_tokens


def read_run(config: Mapping) -> Run:
    """The model of a training config, of its folder or by its published name.

    Of several buckets, the one with most tokens counts: memory must do for it, and no step takes
    longer.

    Raises:
        UserError: it is neither.
    """
    model, factors = transformer_config(config["model"]), _factors(config["model"])
    sizes = cut_of(config["data"]).sizes
    largest = max(sizes, key=lambda size: video_tokens(model, *size, factors))
    size = dict(zip(("num_frames", "height", "width"), largest, strict=True))
    return Run({**config, "data": {**config["data"], **size}}, model, factors)


def _factors(model: str) -> tuple[int, int]:
    if model in PUBLISHED:
        return _PUBLISHED_FACTORS
    path = Path(model).expanduser() / "vae" / "config.json"
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable config.json ({error})") from error
    cogvideox = fields.get("_class_name") == "AutoencoderKLCogVideoX"
    vae = (CogVideoXVAEConfig if cogvideox else WanVAEConfig).from_json(fields)
    return vae.temporal_factor, vae.spatial_factor


def scheduler_of(model: TransformerConfig) -> Scheduler:
    """Its family's: training asks it for the noising process alone."""
    return UniPCConfig() if isinstance(model, WanConfig) else CogVideoXDPMConfig()


def abstract_mesh(sizes: Mapping[str, int]) -> AbstractMesh:
    """A mesh of no devices, for shapes on each of them."""
    shape = tuple(sizes[axis] for axis in AXES)
    return AbstractMesh(shape, AXES, (AxisType.Auto,) * len(shape))


def arguments(run: Run, mesh: Mesh | AbstractMesh) -> tuple[dict, dict, dict, Any, Any]:
    """Of `train_step`, as `jax.ShapeDtypeStruct` with their shardings.

    Returns:
        The state, the batch, the teacher's parameters, the empty prompt and the seed.

    Raises:
        UserError: a parameter does not divide over the mesh.
    """
    full = abstract_params(run.model)
    state = jax.eval_shape(partial(undrawn_state, run.config, run.model), full)
    teacher = jax.eval_shape(partial(held_in_training, run.config, run.model), full)
    whole = NamedSharding(mesh, PartitionSpec())
    batch, empty_text = _batch(run)
    return (
        _placed(state, sharding.shard(state, mesh)),
        _placed(batch, jax.tree.map(lambda _: sharding.samples(mesh), batch)),
        _placed(teacher, sharding.shard(teacher, mesh)),
        _placed(empty_text, whole),
        _placed(jax.ShapeDtypeStruct((), jnp.int32), whole),
    )


def video_and_text(run: Run) -> tuple[tuple[int, ...], tuple[int, int]]:
    """The shapes of one sample: latents `[frames, height, width, channels]`, text `[tokens, d]`."""
    data, (temporal, spatial) = run.config["data"], run.factors
    latents = (
        1 + (data["num_frames"] - 1) // temporal,
        data["height"] // spatial,
        data["width"] // spatial,
        run.model.in_channels,
    )
    width = run.model.text_dim if isinstance(run.model, WanConfig) else run.model.text_embed_dim
    return latents, (data["max_length"], width)


def _batch(run: Run) -> tuple[dict, jax.ShapeDtypeStruct]:
    count = run.config["train"]["batch_size"]
    latents, text = video_and_text(run)
    latents = (count, *latents)
    return {
        "latent_mean": jax.ShapeDtypeStruct(latents, jnp.float32),
        "latent_logvar": jax.ShapeDtypeStruct(latents, jnp.float32),
        "text_embeds": jax.ShapeDtypeStruct((count, *text), jnp.float32),
        "sample_index": jax.ShapeDtypeStruct((count,), jnp.int32),
    }, jax.ShapeDtypeStruct(text, jnp.float32)


def _placed(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )
