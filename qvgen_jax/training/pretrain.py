"""`--job pretrain`: make a small Wan pipeline from nothing but videos and captions.

Autoencoder, then transformer and text encoder together, then a folder in diffusers' layout. Every
stage continues where it stopped.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qvgen_jax.autoencoders.wan import WanVAE
from qvgen_jax.components import VAE, TextEncoder
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.answers import SCORES, score
from qvgen_jax.evaluation.asked import held_out
from qvgen_jax.generation_config import WAN_DEFAULTS
from qvgen_jax.json_file import read_object
from qvgen_jax.models.wan import WanConfig, WanTransformer
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.text.t5 import T5Config, T5Encoder
from qvgen_jax.text.tokenizer import load_tokenizer, tokenize
from qvgen_jax.training import checkpoint
from qvgen_jax.training.pretrain_flow import Clips, pretrain_flow
from qvgen_jax.training.pretrain_vae import TrainedVAE, load_clips, pretrain_vae
from qvgen_jax.transformer import Transformer


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} is missing; the architecture folder has the tiny pipeline's files")
    return read_object(path, "take it from the tiny pipeline again")


def vae_of(trained: TrainedVAE) -> VAE:
    """The trained autoencoder as a pipeline's part."""
    build = nnx.eval_shape(lambda: WanVAE(trained.config, key=jax.random.key(0)))
    return VAE(trained.config, nnx.split(build)[0], (trained.params,))


def encode_clips(vae: VAE, videos: np.ndarray, cache: Path, batch_size: int = 16) -> dict:
    """`mean` and `logvar`, normalised latents of uint8 clips; kept in `cache`."""
    if cache.is_file():
        return dict(np.load(cache))
    parts = []
    for start in range(0, len(videos), batch_size):
        video = jnp.asarray(videos[start : start + batch_size], jnp.float32) / 127.5 - 1.0
        parts.append([np.asarray(x) for x in vae.normalize(*vae.posterior(video))])
        if start % (64 * batch_size) == 0:
            logging.info("encoded %d of %d clips", start, len(videos))
    mean, logvar = (np.concatenate(column) for column in zip(*parts, strict=True))
    partial = cache.with_suffix(".tmp.npz")
    np.savez(partial, mean=mean, logvar=logvar)
    partial.replace(cache)
    return {"mean": mean, "logvar": logvar}


def caption_tokens(tokenizer: Any, folder: Path, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and masks of a data folder's captions in file order, the empty prompt's last."""
    lines = (folder / "captions.jsonl").read_text(encoding="utf-8").splitlines()
    rows = sorted((json.loads(line) for line in lines), key=lambda row: row["file"])
    return tokenize(tokenizer, [*(row["caption"] for row in rows), ""], max_length)


class Networks:
    """The two networks that flow matching trains: configs, definitions, initial parameters."""

    def __init__(self, architecture: Path, dtype: jnp.dtype, seed: int):
        self.transformer = WanConfig.from_json(_read(architecture / "transformer/config.json"))
        self.text_encoder = T5Config.from_json(_read(architecture / "text_encoder/config.json"))
        keys = jax.random.split(jax.random.key(seed))
        built = {
            "transformer": WanTransformer(self.transformer, key=keys[0], dtype=dtype),
            "text_encoder": T5Encoder(self.text_encoder, key=keys[1], dtype=dtype),
        }
        split = {name: nnx.split(network, nnx.Param) for name, network in built.items()}
        self.definitions = {name: definition for name, (definition, _) in split.items()}
        self.params = {name: nnx.to_pure_dict(params) for name, (_, params) in split.items()}

    def pipeline(self, params: Mapping, vae: VAE, tokenizer: Any, scheduler: Any, defaults: Any):
        """A pipeline around `params`."""
        transformer = Transformer(
            self.transformer, self.definitions["transformer"], (params["transformer"],)
        )
        text = TextEncoder(
            self.text_encoder, self.definitions["text_encoder"], (params["text_encoder"],)
        )
        return Pipeline(transformer, vae, text, tokenizer, scheduler, defaults)


def pretrain(config: Mapping, workdir: Path) -> Pipeline:
    """Train all parts in `workdir`, or continue; the trained pipeline.

    Args:
        config: as `configs/tiny_pretrain.py`.
        workdir: `vae/`, `flow/` (checkpoints, metrics, the judge's curve).

    Raises:
        UserError: the clips are missing, or the workdir is of another config.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    flow, data = config["flow"], Path(config["flow"]["data"])
    checkpoint.compare_workdir(workdir, config)
    for section in (config["vae_train"], flow):
        if not Path(section["data"]).is_dir():
            raise UserError(
                f"{section['data']} is missing; the docstring of the config says how to make it"
            )
    checkpoint.claim_workdir(workdir, config)
    trained = pretrain_vae(config["vae_train"], workdir / "vae")
    vae = vae_of(trained)
    architecture = Path(flow["architecture"])
    tokenizer = load_tokenizer(architecture / "tokenizer")
    defaults = WAN_DEFAULTS | dict(flow["generation"])
    scheduler = UniPCConfig.from_json(_read(architecture / "scheduler/scheduler_config.json"))

    (workdir / "flow").mkdir(parents=True, exist_ok=True)
    cache = workdir / "flow" / "latents.npz"
    latents = encode_clips(vae, None if cache.is_file() else load_clips(data), cache)
    clips = Clips(**latents, **_tokens(tokenizer, data, defaults["max_length"]))
    networks = Networks(architecture, jnp.dtype(flow["dtype"]), flow["seed"])

    def judged(params: dict) -> dict:
        pipe = networks.pipeline(params, vae, tokenizer, scheduler, defaults)
        asked = held_out(flow["evaluate_videos"], flow["seed"])
        found = score(pipe, asked, batch_size=32)
        shares = {name: round(float(found[name].mean()), 4) for name in SCORES}
        logging.info("judge: %s", shares)
        return shares

    params = pretrain_flow(
        networks.definitions, networks.params, clips, flow, flow["seed"], workdir / "flow", judged
    )
    return networks.pipeline(params, vae, tokenizer, scheduler, defaults)


def _tokens(tokenizer: Any, data: Path, max_length: int) -> dict[str, np.ndarray]:
    tokens, mask = caption_tokens(tokenizer, data, max_length)
    return {"tokens": tokens, "mask": mask}
