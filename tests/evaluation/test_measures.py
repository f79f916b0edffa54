"""Measures of videos against scikit-image's, and against what is known by construction."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from qvgen_jax.data.moving_shapes import held_out_prompts, render
from qvgen_jax.evaluation.measures import SAME, consistency, motion, psnr, ssim


@pytest.fixture(scope="module")
def clip():
    return render(held_out_prompts()[0], np.random.default_rng(0))


def noisy(video, strength):
    noise = np.random.default_rng(1).normal(0, strength, video.shape)
    return np.clip(video + noise, 0, 255).astype(np.uint8)


def test_psnr_is_scikit_image_s_and_ends_at_100_db(clip):
    other = noisy(clip, 9)
    expected = peak_signal_noise_ratio(clip, other, data_range=255)
    assert psnr(other, clip) == pytest.approx(expected, abs=1e-9)  # The same formula in float64.
    assert psnr(clip, clip) == SAME


def test_ssim_is_the_mean_over_frames_of_scikit_image_s_on_floats(clip):
    other = noisy(clip, 9)
    assert ssim(clip, clip) == 1
    frames = [
        structural_similarity(
            a / 255.0,
            b / 255.0,
            channel_axis=-1,
            data_range=1.0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for a, b in zip(clip, other, strict=True)
    ]
    # The same windows in another range: rounding in float64.
    assert ssim(other, clip) == pytest.approx(np.mean(frames), abs=1e-6)
    assert ssim(noisy(clip, 30), clip) < ssim(other, clip) < 0.99


def test_consistency_is_one_for_a_still_and_less_for_one_that_flickers(clip):
    still = np.repeat(clip[:1], 5, axis=0)
    assert consistency(still) == pytest.approx(1, abs=1e-12)  # Rounding of three sums.
    flicker = np.zeros((4, 8, 8, 3), np.uint8)
    flicker[::2, :, :4] = 255
    flicker[1::2, :, 4:] = 255
    # By hand: (256 + 256) / (256^2 + 1^2), halves of 256 and of 1 that change places.
    assert consistency(flicker) == pytest.approx(512 / 65537, abs=1e-12)
    assert consistency(np.zeros((3, 8, 8, 3), np.uint8)) == pytest.approx(1)
    assert np.isnan(consistency(clip[:1]))


def test_motion_is_the_mean_change_of_a_level():
    video = np.zeros((3, 4, 4, 3), np.uint8)
    video[1] = 10
    video[2] = 4
    assert motion(video) == 8  # 10 up, 6 down: no wrap-around of uint8.
    assert np.isnan(motion(video[:1]))
