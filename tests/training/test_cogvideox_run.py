"""Training CogVideoX1.5: v-prediction, patches over time, and a student that learns."""

import json
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.diffusion.cogvideox_dpm import CogVideoXDPMConfig
from qvgen_jax.models.cogvideox import CogVideoXTransformer
from qvgen_jax.models.cogvideox_config import CogVideoXConfig
from qvgen_jax.training import loop
from qvgen_jax.training.step import fill_patches
from tests.training.test_run import CONFIG

MODEL = CogVideoXConfig(
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=2,
    out_channels=2,
    text_embed_dim=8,
    time_embed_dim=8,
    num_layers=2,
    sample_height=4,
    sample_width=4,
    patch_size=(2, 2, 2),
    use_rotary_positional_embeddings=True,
)


class Clips:
    """Four clips of three latent frames, as `EncodedDataset` gives them."""

    max_length = 5
    empty_text_embeds = np.zeros((5, 8), np.float32)
    buckets = MappingProxyType({"of one size": range(4)})

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng(int(index))
        return {
            "latent_mean": rng.standard_normal((3, 4, 4, 2)).astype(np.float32),
            "latent_logvar": np.full((3, 4, 4, 2), -6.0, np.float32),
            "text_embeds": rng.standard_normal((5, 8)).astype(np.float32),
            "caption": "a clip",
        }


def test_clips_are_filled_in_front_with_their_first_frame():
    batch = {name: jnp.arange(6.0).reshape(2, 3, 1) for name in ("latent_mean", "latent_logvar")}
    filled = fill_patches({**batch, "sample_index": 1}, 2)
    assert filled["latent_mean"][:, :, 0].tolist() == [[0, 0, 1, 2], [3, 3, 4, 5]]
    assert fill_patches(batch, 3)["latent_logvar"].shape == (2, 3, 1)


@pytest.mark.slow
def test_a_whole_run_lowers_the_loss_and_ends_without_a_branch(tmp_path):
    rng = np.random.default_rng(0)
    build = nnx.eval_shape(lambda: CogVideoXTransformer(MODEL, key=jax.random.key(0)))
    shapes = nnx.to_pure_dict(nnx.state(build, nnx.Param))
    teacher = jax.tree.map(lambda s: jnp.asarray(rng.normal(0, 0.3, s.shape), jnp.float32), shapes)
    train = {key: value for key, value in CONFIG["train"].items() if key != "shift"}
    rates = {"weights": 1e-2, "branch": 1e-2, "scales": 1e-3, "clips": 1e-2}
    config = {
        **CONFIG,
        "quant": {**CONFIG["quant"], "bits": (), "weight_bits": 2, "act_bits": 8},
        "train": {**train, "steps": 80, "learning_rate": rates, "checkpoint_every": 80},
    }
    scheduler = CogVideoXDPMConfig(rescale_betas_zero_snr=True)
    state, _ = loop.run_steps(config, tmp_path, MODEL, scheduler, teacher, Clips())
    losses = [row["loss"] for row in map(json.loads, (tmp_path / "metrics.jsonl").open())]
    assert np.mean(losses[-20:]) < 0.8 * np.mean(losses[:10])
    assert "L" not in state["params"]["blocks"]["attn1"]["to_q"]
