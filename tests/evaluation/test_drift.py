"""Held-out loss and drift on arrays whose distances are known, and what a pipeline is asked."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qvgen_jax.diffusion.guidance import Guidance
from qvgen_jax.diffusion.schedulers import make_schedule, scheduler_from_json
from qvgen_jax.diffusion.unipc import UniPCConfig
from qvgen_jax.evaluation import drift

CLIPS = {
    "latents": np.random.default_rng(0).normal(size=(5, 3, 2, 2, 4)).astype(np.float32),
    "text_embeds": np.ones((5, 3, 8), np.float32),
}


class Network:
    """Predicts its input times a factor; remembers what it was asked."""

    def __init__(self, factor: float = 1.0, patch: int = 1):
        self.factor, self.asked = factor, []
        self.config = SimpleNamespace(patch_size=(patch, 2, 2))
        self.states = ({"kernel": np.full(3, factor)},)

    def __call__(self, latents, timesteps, text_embeds):
        self.asked.append((np.asarray(latents), np.asarray(timesteps)))
        return self.factor * latents


def test_predictions_are_of_every_clip_whatever_the_batch():
    scheduler = UniPCConfig()
    whole = drift.predictions(Network(), CLIPS, scheduler, batch_size=5, timesteps=(100, 900))
    parts = drift.predictions(Network(), CLIPS, scheduler, batch_size=2, timesteps=(100, 900))
    assert whole.shape == (2, 5, 3, 2, 2, 4)
    np.testing.assert_array_equal(whole, parts)


def test_inputs_are_noised_by_their_timestep_and_each_clip_has_its_own_noise():
    network = Network()
    drift.predictions(network, CLIPS, UniPCConfig(), batch_size=5, timesteps=(0, 1000))
    (clean, at_0), (noise, at_1000) = network.asked
    np.testing.assert_array_equal(clean, CLIPS["latents"])
    assert set(at_0) == {0}
    assert set(at_1000) == {1000}
    assert len(np.unique(noise[:, 0, 0, 0, 0])) == 5
    assert abs(noise.std() - 1) < 0.15  # 240 normal numbers.


def test_clips_are_filled_up_to_whole_temporal_patches():
    network = Network(patch=2)
    drift.predictions(network, CLIPS, UniPCConfig(), batch_size=5, timesteps=(500,))
    assert network.asked[0][0].shape == (5, 4, 2, 2, 4)


def test_a_student_that_says_0_9_of_everything_has_the_loss_that_follows():
    teacher = np.random.default_rng(1).normal(size=(2, 6, 3, 4, 4, 2))
    found = drift.compare_predictions(0.9 * teacher, teacher)
    np.testing.assert_allclose(found["mse"], 0.01 * np.square(teacher).mean((1, 2, 3, 4, 5)))
    np.testing.assert_allclose(found["normalised"], 0.01, rtol=0.01)  # The mean is not exactly 0.
    np.testing.assert_allclose(found["cosine"], 1)
    np.testing.assert_allclose(found["relative"], 0.1)
    assert found["mean"]["relative"] == pytest.approx(0.1)
    assert np.mean(found["per_clip"]) == pytest.approx(found["mean"]["normalised"])


def test_drift_is_relative_and_a_still_video_is_found():
    teacher = np.random.default_rng(2).normal(size=(3, 4, 2, 2, 5))
    same = drift.compare_latents(teacher, teacher)
    assert (same["relative"], same["motion"], same["variance"]) == (0, 1, 1)

    still = teacher.copy()
    still[1] = teacher[1].mean(0)  # Every frame is the same.
    found = drift.compare_latents(still, teacher)
    assert found["motion_least"] == 0
    assert 0.5 < found["motion"] < 0.8
    assert found["per_video"][0] == 0
    expected = np.linalg.norm(still[1] - teacher[1]) / np.linalg.norm(teacher[1])
    assert found["per_video"][1] == pytest.approx(expected)


def pipeline(factor: float) -> SimpleNamespace:
    network = Network(factor)

    def sample_latents(prompts, seeds, batch_size, guidance):
        network.asked.append(list(zip(prompts, seeds, strict=True)))
        network.guidance = guidance
        ramp = np.arange(8.0).reshape(2, 2, 2, 1)
        return factor * np.stack([ramp + seed for seed in seeds])

    return SimpleNamespace(
        transformer=network,
        vae=network,
        text_encoder=network,
        scheduler=UniPCConfig(),
        defaults={"steps": 25, "guidance_scale": 3.0, "unguided_steps": 0},
        sample_latents=sample_latents,
    )


def test_the_measured_timesteps_are_the_samplers_own_and_spread_over_all_noise():
    pipe = pipeline(1.0)
    found = drift.bucket_timesteps(pipe)
    assert set(found) <= set(make_schedule(pipe.scheduler, 25).timesteps.tolist())
    assert len(found) >= 8
    assert np.diff(found).max() <= 150
    pipe.defaults["steps"] = 2  # Fewer timesteps than buckets: each once.
    assert len(drift.bucket_timesteps(pipe)) == 2


def test_the_tiny_pipeline_is_measured_at_nine_timesteps():
    """Its 25 steps have one, 113, for the two buckets nearest the clean end; docs/study.md."""
    path = "assets/tiny_wan/scheduler/scheduler_config.json"
    scheduler = scheduler_from_json(json.loads(Path(path).read_text()))
    pipe = SimpleNamespace(scheduler=scheduler, defaults={"steps": 25})
    assert drift.bucket_timesteps(pipe) == (113, 292, 365, 429, 539, 667, 765, 842, 956)


def test_the_teacher_is_asked_once_for_all_runs_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(drift, "ensure_held_out", lambda *_: None)
    monkeypatch.setattr(drift, "EncodedDataset", lambda *_: None)
    monkeypatch.setattr(drift, "read_clips", lambda _: CLIPS)
    config = {
        "data": {"max_length": 3},
        "evaluate": {
            "held_out": "clips",
            "drift_videos": 4,
            "seed": 7,
            "reference": str(tmp_path / "shared"),
        },
        "sample": {"prompts": "held_out", "batch_size": 2},
    }
    teacher, student = pipeline(1.0), pipeline(0.5)
    student.defaults["unguided_steps"] = 4  # The networks are compared, not their settings.
    found = drift.measure(config, tmp_path, teacher, student)
    assert found["held_out"]["mean"]["relative"] == pytest.approx(0.5)
    assert found["drift"]["relative"] == pytest.approx(0.5)
    assert [seed for _, seed in student.transformer.asked[-1]] == [7, 8, 9, 10]
    written = json.loads((tmp_path / "held_out.json").read_text())
    assert written["drift"] == found["drift"]
    assert student.transformer.guidance == teacher.transformer.guidance == Guidance(3.0)

    calls = len(teacher.transformer.asked)
    drift.measure(config, tmp_path, teacher, student)
    assert len(teacher.transformer.asked) == calls
    teacher.defaults["steps"] = 20  # Other timesteps: asked again, for both.
    drift.measure(config, tmp_path, teacher, student)
    assert len(teacher.transformer.asked) > calls
    drift.measure(config, tmp_path, pipeline(2.0), student)  # Another teacher: its own answers.
    assert json.loads((tmp_path / "held_out.json").read_text())["drift"]["relative"] == 0.75


def test_nothing_is_measured_where_nothing_was_asked(tmp_path):
    config = {
        "evaluate": {"held_out": "", "drift_videos": 0, "seed": 0, "reference": ""},
        "sample": {"prompts": "held_out", "batch_size": 2},
    }
    assert drift.measure(config, tmp_path, pipeline(1.0), pipeline(1.0)) == {}
    assert not (tmp_path / "held_out.json").exists()
