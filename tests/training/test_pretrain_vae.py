"""Training a VAE from nothing: its start, its stages, and going on after an interruption."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from qvgen_jax.autoencoders.wan import WanVAEConfig
from qvgen_jax.data.video import write_video
from qvgen_jax.errors import UserError
from qvgen_jax.training import pretrain_vae as module
from qvgen_jax.training.pretrain_vae import describe, load_clips, pretrain_vae, psnr
from qvgen_jax.training.vae_initialize import initial_params
from qvgen_jax.training.vae_stages import Stage, crops, learning_rate, read_stages, stage_at

MODEL = {
    "base_dim": 2,
    "z_dim": 2,
    "dim_mult": (1, 2),
    "num_res_blocks": 1,
    "temperal_downsample": (True,),
    "latents_mean": (0.0, 0.0),
    "latents_std": (1.0, 1.0),
}
CONFIG = {
    "seed": 0,
    "dtype": "float32",
    "model": MODEL,
    "stages": ((3, 8, 2, 3),),
    "learning_rate": 1e-3,
    "warmup_steps": 2,
    "weight_decay": 1e-4,
    "foreground_weight": 5.0,
    "kl_weight": 1e-4,
    "log_every": 1,
    "eval_every": 10,
    "eval_clips": 1,
    "statistics_clips": 2,
    "checkpoint_seconds": 0.0,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three clips of five frames of a bright square on black."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(3):
        clip = np.zeros((5, 16, 16, 3), np.uint8)
        clip[:, 4 + i : 10 + i, 5:11] = (230, 30, 30)
        write_video(folder / f"{i}.mp4", clip, 8)
    return folder


@pytest.mark.slow
def test_an_interrupted_run_ends_as_an_uninterrupted_one(folder, tmp_path, monkeypatch):
    config = {**CONFIG, "data": str(folder)}
    straight = pretrain_vae(config, tmp_path / "straight")

    batches = iter(range(2))

    def interrupted(clips, stage, rng):
        if next(batches, None) is None:
            raise KeyboardInterrupt
        return crops(clips, stage, rng)

    monkeypatch.setattr(module, "crops", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain_vae(config, tmp_path / "resumed")
    monkeypatch.undo()
    resumed = pretrain_vae(config, tmp_path / "resumed")

    assert resumed.config == straight.config
    jax.tree.map(np.testing.assert_array_equal, resumed.params, straight.params)
    curves = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("straight", "resumed")]
    assert curves[0] == curves[1]
    assert len(curves[0].splitlines()) == 3
    assert "psnr" in curves[0].splitlines()[-1]


def test_a_still_clip_starts_with_the_same_latents_and_frames_at_every_time():
    config = WanVAEConfig.from_json(MODEL)
    graphdef, shapes = describe(config, jnp.float32)
    model = nnx.merge(graphdef, initial_params(shapes, jax.random.key(1)))
    frame = np.random.default_rng(0).uniform(-1, 1, (1, 1, 4, 8, 3)).astype(np.float32)
    mean, logvar = jax.jit(model.encode_whole)(np.repeat(frame, 5, axis=1))
    assert mean.shape == (1, 3, 2, 4, 2)
    np.testing.assert_allclose(mean, np.repeat(mean[:, :1], 3, axis=1), rtol=1e-3, atol=1e-4)
    assert abs(float(logvar.mean()) + 4.5) < 0.5
    video = jax.jit(model.decode_whole)(mean[:, :1].repeat(3, axis=1))
    np.testing.assert_allclose(video, np.repeat(video[:, :1], 5, axis=1), rtol=1e-3, atol=1e-4)


def test_crops_are_cut_out_of_the_clips_and_tell_their_background():
    clips = np.random.default_rng(0).integers(0, 256, (4, 9, 12, 16, 3)).astype(np.uint8)
    batch = crops(clips, Stage(5, 8, 3, 1), np.random.default_rng(1))
    assert batch["video"].shape == (3, 5, 8, 8, 3)
    for video, background in zip(batch["video"], batch["background"], strict=True):
        (clip,) = (clip for clip in clips if (clip[0, 0, 0] == background).all())
        windows = np.lib.stride_tricks.sliding_window_view(clip, (5, 8, 8, 3))
        assert (windows == video).all((-4, -3, -2, -1)).any()


def test_the_learning_rate_warms_up_and_decays_with_the_pixels_seen():
    stages = [Stage(1, 8, 4, 100), Stage(3, 8, 4, 100)]
    rate = learning_rate({"learning_rate": 1.0, "warmup_steps": 10}, stages)
    assert float(rate(0)) == pytest.approx(0.1, abs=1e-3)
    # A quarter of the pixels is seen in the first half of the steps.
    assert float(rate(100)) == pytest.approx(0.01 + 0.99 * 0.8536, abs=1e-3)
    assert float(rate(200)) == pytest.approx(0.01, abs=1e-4)


def test_a_stage_knows_its_last_step():
    stages = [Stage(1, 8, 4, 2), Stage(3, 8, 4, 1)]
    assert [stage_at(stages, step) for step in range(3)] == [
        (stages[0], False),
        (stages[0], True),
        (stages[1], True),
    ]


def test_a_stage_longer_than_the_clips_is_refused():
    clips = np.zeros((1, 5, 16, 16, 3), np.uint8)
    with pytest.raises(UserError, match=r"frames=9.*clips of 5 frames"):
        read_stages([(9, 8, 2, 10)], clips)


def test_a_folder_without_clips_is_refused_by_name(tmp_path):
    with pytest.raises(UserError, match="holds no mp4 files"):
        load_clips(tmp_path)


def test_psnr_of_a_difference_of_one_step_is_48_decibels():
    a = np.full((2, 3, 4, 4, 3), 100, np.uint8)
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)
