"""Requests on the embedded tiny pipeline, without a page; it stands on both sides."""

import dataclasses

import numpy as np
import pytest

import qvgen_jax
from qvgen_jax.data.moving_shapes import example
from qvgen_jax.errors import UserError
from qvgen_jax.serve.generate import Studio, Timing, ratio
from qvgen_jax.serve.limits import BOTH, FULL, LOW, Asked
from qvgen_jax.serve.preview import fit_colours, patch_colours, preview

SMALL = Asked("a red star moving right", "", 3, 5, 32, 32, 3, 2.0, BOTH)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def studio() -> Studio:
    teacher = qvgen_jax.load("assets/tiny_wan")
    return Studio(teacher, dataclasses.replace(teacher))


@pytest.fixture(scope="module")
def told(studio):
    return list(studio.generate(SMALL))


def test_every_step_of_both_sides_is_told_and_then_the_video(studio, told):
    steps = [(now.side, now.step) for now in told]
    assert steps == [(side, step) for side in (FULL, LOW) for step in range(4)]
    videos = [now.frames for now in told if now.frames is not None]
    expected = studio.teacher.generate(
        SMALL.prompt, "", seeds=3, num_frames=5, height=32, width=32, steps=3, guidance_scale=2.0
    )[0]
    for video in videos:
        # Steps are other programs than the scan: a pixel may round to the next of 255.
        assert np.abs(video.astype(int) - expected).max() <= 1
    # The same transformer from the same noise, by the same programs.
    np.testing.assert_array_equal(*videos)
    assert all(now.timing.step > 0 for now in told if now.timing)


def test_previews_have_the_colours_of_the_video(studio):
    """On clips that the map was not fitted to."""
    colours, errors, of_gray = fit_colours(studio.teacher), [], []
    for index in range(3):
        clip = example(index, seed=1, split="heldout")[0][:5]
        latents = studio.teacher.to_latents(clip[None].astype(np.float32) / 127.5 - 1)
        shown = np.stack(np.split(preview(latents, colours), 2, axis=1)).astype(float)
        patches = patch_colours(clip[None].astype(float), (2, 8, 8))[0]
        errors.append(np.abs(shown - patches).mean())
        of_gray.append(np.abs(128 - patches).mean())
    # Nearly the colours, not the picture; a gray preview is off by more than twice as much.
    assert np.mean(errors) < 25 < np.mean(of_gray) / 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 6}, "use 5"),
        ({"width": 40}, "expected a multiple of 16"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": None}, "seed is None"),
        ({"steps": 1000}, "expected a whole number from 1 to 100"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
)
def test_a_wrong_request_is_refused_before_its_first_step(studio, changes, message):
    with pytest.raises(UserError, match=message):
        next(studio.generate(SMALL._replace(**changes)))


def test_a_request_that_is_left_does_not_hold_up_the_next(studio):
    left = studio.generate(SMALL)
    next(left), next(left)
    other = [now.step for now in studio.generate(SMALL._replace(sides=FULL))]
    assert other == [0, 1, 2, 3]
    assert next(left).step == 2


def test_the_ratio_is_of_median_steps_and_needs_both():
    full, low = Timing(2.0, 30.0, 1.0), Timing(0.5, 99.0, 1.0)
    assert ratio({FULL: full, LOW: low}) == 4.0
    assert ratio({FULL: full}) is None
