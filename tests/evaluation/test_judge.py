import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from qvgen_jax.data.moving_shapes import SHAPES, Attributes, example, render
from qvgen_jax.data.video import read_video, write_video
from qvgen_jax.evaluation.judge import STRICT_IOU, judge, plain, strict


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_true_clips_are_judged_right_plain_and_strict(split):
    for index in range(40):
        video, attributes = example(index, seed=11, split=split)
        verdict = judge(video)
        assert strict(verdict, attributes), (attributes, verdict)
        assert verdict.speed == attributes.speed


def test_what_h264_and_blur_do_to_a_clip_does_not_change_the_verdict(tmp_path):
    for index in range(8):
        video, attributes = example(index, seed=12)
        write_video(tmp_path / "clip.mp4", video, 8)
        assert strict(judge(read_video(tmp_path / "clip.mp4")), attributes)
        blurred = gaussian_filter(video.astype(np.float32), (0.5, 1.5, 1.5, 0))
        assert strict(judge(blurred.astype(np.uint8)), attributes)


def test_two_bad_frames_neither_turn_the_track_nor_change_the_shape():
    video, attributes = example(0, seed=13)
    video[3] = 0
    video[9] = video[0, 0, 0]
    assert plain(judge(video), attributes)


def test_every_wrong_attribute_fails_the_plain_judgement():
    rng = np.random.default_rng(0)
    truth = Attributes("square", "red", "up", "slowly", "black")
    verdict = judge(render(truth, rng))
    assert plain(verdict, truth)
    for wrong in ({"shape": "circle"}, {"colour": "blue"}, {"direction": "up-left"}):
        assert not plain(verdict, truth._replace(**wrong))
    assert plain(verdict, truth._replace(background="white"))


def test_a_distorted_outline_can_be_plainly_right_and_strictly_wrong():
    rng = np.random.default_rng(1)
    truth = Attributes("cross", "cyan", "down", "quickly", "gray")
    columns = (32 + (np.arange(64) - 32) / 1.6).astype(int)
    verdict = judge(render(truth, rng)[:, :, columns])
    assert plain(verdict, truth)
    assert verdict.ious["cross"] < STRICT_IOU
    assert not strict(verdict, truth)


def test_nothing_and_noise_have_no_name():
    noise = np.random.default_rng(2).integers(0, 256, (17, 64, 64, 3)).astype(np.uint8)
    for video in (np.full((17, 64, 64, 3), 128, np.uint8), noise):
        verdict = judge(video)
        assert (verdict.shape, verdict.colour, verdict.direction, verdict.speed) == (None,) * 4
        assert verdict.ious == dict.fromkeys(SHAPES, 0.0)


def test_a_single_frame_has_a_shape_and_no_direction():
    video, attributes = example(3, seed=14)
    verdict = judge(video[:1])
    assert (verdict.shape, verdict.colour) == attributes[:2]
    assert verdict.direction is None


def test_float_video_is_refused_with_its_type_and_shape():
    with pytest.raises(ValueError, match=r"uint8 .* got float32 \[17, 64, 64, 3\]"):
        judge(np.zeros((17, 64, 64, 3), np.float32))
