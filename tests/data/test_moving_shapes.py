import itertools

import numpy as np
import pytest

from qvgen_jax.data import moving_shapes
from qvgen_jax.data.video import read_video, write_video
from qvgen_jax.errors import UserError


def test_a_clip_is_a_pure_function_of_seed_and_index():
    first, attributes = moving_shapes.example(7, seed=3)
    again, same = moving_shapes.example(7, seed=3)
    other, _ = moving_shapes.example(7, seed=4)
    assert attributes == same
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_shape_never_touches_the_border():
    for index in range(90):
        video, attributes = moving_shapes.example(index, seed=1, spread=6.0)
        assert video.shape == (17, 64, 64, 3)
        background = moving_shapes.BACKGROUNDS[attributes.background]
        for edge in (video[:, 0], video[:, -1], video[:, :, 0], video[:, :, -1]):
            assert (edge == background).all(), moving_shapes.caption(attributes)


def test_shapes_of_one_radius_have_similar_areas():
    areas = {
        shape: moving_shapes.coverage(shape, 10.0, np.array([[32.0, 32.0]])).sum()
        for shape in moving_shapes.SHAPES
    }
    assert max(areas.values()) / min(areas.values()) < 1.5
    assert areas["circle"] == pytest.approx(np.pi * 100, rel=0.01)


def test_every_pair_of_values_is_trained_on_and_the_triples_split_is_clean():
    train, held_out = moving_shapes.triples()
    assert (len(train), len(held_out)) == (180, 60)
    assert not set(train) & set(held_out)
    names = (moving_shapes.SHAPES, moving_shapes.COLOURS, moving_shapes.DIRECTIONS)
    for (i, first), (j, second) in itertools.combinations(enumerate(names), 2):
        seen = {(triple[i], triple[j]) for triple in train}
        assert seen == set(itertools.product(first, second))


def test_held_out_prompts_are_360_different_ones_that_no_training_clip_has():
    prompts = moving_shapes.held_out_prompts()
    assert len(set(map(moving_shapes.caption, prompts))) == 360
    trained = {moving_shapes.example(index, seed=0)[1] for index in range(20)}
    assert not trained & set(prompts)


def test_the_folder_holds_readable_clips_and_their_captions(tmp_path):
    moving_shapes.write_folder(tmp_path, count=2, seed=5, split="heldout")
    video, attributes = moving_shapes.example(1, seed=5, split="heldout")
    read = read_video(tmp_path / "00001.mp4")
    # 4:2:0 chroma smears the outline by a pixel; nothing else may differ.
    assert np.abs(read.astype(int) - video).mean() < 2
    assert moving_shapes.caption(attributes) in (tmp_path / "captions.jsonl").read_text()


def test_a_broken_video_is_named_with_the_reason(tmp_path):
    path = tmp_path / "broken.mp4"
    path.write_bytes(b"not a video at all")
    with pytest.raises(UserError, match=r"broken\.mp4 does not decode"):
        read_video(path)
    with pytest.raises(UserError, match=r"missing\.mp4 does not decode"):
        read_video(tmp_path / "missing.mp4")


def test_an_odd_size_is_refused_before_the_encoder_sees_it(tmp_path):
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "odd.mp4", np.zeros((2, 9, 8, 3), np.uint8), 8)


def test_a_video_s_bytes_are_a_function_of_its_frames_whatever_lies_in_memory(tmp_path):
    """As x264's AVX-512 code is not, which some processors run: eight files of one such video."""
    rng = np.random.default_rng(0)
    waves = [np.cumsum(rng.normal(size=(5, 32, 32, 3)), 0) for _ in range(10)]
    videos = [np.clip(128 + 2 * w.cumsum(1).cumsum(2), 0, 255).astype(np.uint8) for w in waves]
    for frames in videos:
        found = set()
        for _ in range(10):
            junk = [rng.integers(0, 256, size, np.uint8) for size in rng.integers(1e2, 2e5, 60)]
            del junk
            write_video(tmp_path / "clip.mp4", frames, 8)
            found.add((tmp_path / "clip.mp4").read_bytes())
        assert len(found) == 1
