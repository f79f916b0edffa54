"""Calibration inputs are what the pipeline's own sampling gives its transformer."""

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

import qvgen_jax
from qvgen_jax.errors import UserError
from qvgen_jax.ptq import trajectory
from qvgen_jax.ptq.trajectory import batch_rows, sampled_inputs
from tests.evaluation.small_pipelines import write_full

SIZE = {"num_frames": 5, "height": 32, "width": 32, "max_length": 7}


@pytest.mark.slow
def test_the_inputs_are_those_of_the_steps_that_generate_takes(tmp_path):
    folder = write_full(tmp_path / "full", guidance_scale=2.0)
    pipe = qvgen_jax.load(folder, keep_on_host=True)
    assert isinstance(pipe.transformer.states[0]["proj_out"]["kernel"], np.ndarray)
    prompts = ["a red circle moving right", "a green cross"]
    calibration = {"steps": 4, "every": 2, "batch_size": 2}
    found = sampled_inputs(pipe, prompts, calibration, SIZE, 7, jnp.dtype("float32"))
    assert found.latents.shape[0] == 2 * 2 * len(prompts)  # Kept steps, with a prompt and without.
    both = pipe.encode_prompt([*prompts, "", ""], 7)
    np.testing.assert_array_equal(found.text_embeds, np.concatenate([both, both]))
    for number, prompt in enumerate(prompts):
        settings = {**SIZE, "steps": 4, "seeds": 7 + number}
        steps = [np.asarray(step.latents[0]) for step in pipe.latent_steps(prompt, **settings)]
        for index, sample in ((1, 4 + number), (1, 6 + number)):
            # Streamed, and other rows at once: float32 sums in another order, over two steps.
            scale = np.abs(steps[index]).max()
            np.testing.assert_allclose(found.latents[sample], steps[index], atol=1e-4 * scale)
    assert len(set(found.timesteps[:4])) == 1
    assert found.timesteps[0] > found.timesteps[4]


def test_a_step_that_the_devices_cannot_share_is_told_before_the_first(tmp_path, monkeypatch):
    pipe = qvgen_jax.load(write_full(tmp_path / "full", guidance_scale=2.0), keep_on_host=True)
    known = dict.fromkeys([("a red star", 7), ("", 7)], jnp.zeros((7, 16)))
    defaults = {**pipe.defaults, "unguided_steps": 1}
    pipe = dataclasses.replace(pipe, defaults=defaults, encoded=known)
    calibration = {"steps": 2, "every": 1, "batch_size": 2}
    monkeypatch.setattr(trajectory, "predict", None)  # Nothing is predicted.
    two = SimpleNamespace(size=2)  # One prompt is two samples with guidance, and one without.
    with pytest.raises(UserError, match="1 samples at a time do not divide over 2 devices"):
        sampled_inputs(pipe, ["a red star"], calibration, SIZE, 0, jnp.dtype("float32"), two)


def test_batches_divide_the_samples_and_the_devices():
    assert batch_rows(40, 20, 1) == 20
    assert batch_rows(40, 19, 1) == 10
    assert batch_rows(32, 1, 8) == 8  # One for each.
    with pytest.raises(UserError, match=r"20 samples .* over 8 devices; let .* be a multiple of 8"):
        batch_rows(20, 16, 8)
