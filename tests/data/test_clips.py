"""What of a video becomes clips, against what PyAV decodes of files with known frames."""

from fractions import Fraction

import av
import numpy as np
import pytest

from qvgen_jax.data.clips import Cut, Size, at_rate, best_size, clips_of, corner, cut_of, parse_size
from qvgen_jax.data.video import read_frames, survey_video, write_video
from qvgen_jax.errors import UserError

DATA = {"buckets": (), "num_frames": 5, "height": 32, "width": 48, "fps": 8.0, "crop": "centre"}


def write_grey(path, greys, times=None, size=(32, 32), rate=10, **options):
    """A video whose frame i is of the grey `greys[i]` and appears at `times[i]` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width = size
        stream.options = {"crf": "0", "preset": "ultrafast", **options}
        base = Fraction(1, 1000 if times else rate)
        stream.codec_context.time_base = base
        for index, grey in enumerate(greys):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), grey, np.uint8), format="rgb24")
            at = index / rate if times is None else times[index]
            frame.pts, frame.time_base = round(at / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def greys_of(path, indices, **options) -> list[int]:
    frames = read_frames(path, survey_video(path), indices, (16, 16), **options)
    return frames[:, 8, 8, 0].tolist()


@pytest.mark.parametrize(
    ("own", "asked", "expected"),
    [
        (16, 16, [0, 1, 2, 3, 4, 5, 6, 7]),
        (30, 15, [0, 2, 4, 6]),
        (24, 16, [0, 1, 3, 4, 6]),
        (8, 16, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7]),
        (29.97, 29.97, [0, 1, 2, 3, 4, 5, 6, 7]),
        (60, 24, [0, 2, 5]),
    ],
)
def test_at_every_moment_the_frame_is_taken_that_is_on_the_screen(own, asked, expected):
    assert at_rate(np.arange(8) / own + 0.7, asked).tolist() == expected


@pytest.mark.parametrize(("own", "asked"), [(16, 16), (24, 24), (30, 15), (48, 16), (24, 16)])
def test_times_in_milliseconds_give_the_frames_of_exact_ones(own, asked):
    exact = np.arange(200) / own
    np.testing.assert_array_equal(at_rate(np.round(exact, 3), asked), at_rate(exact, asked))


def test_a_rate_that_varies_is_followed_by_the_clock():
    times = np.array([0.0, 0.1, 0.2, 1.0, 1.1])
    assert at_rate(times, 10).tolist() == [0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 4, 4]


def test_one_frame_is_a_video_too():
    assert at_rate(np.array([0.0]), 16).tolist() == [0]
    assert [clip.tolist() for clip in clips_of(np.array([0.0]), 1, 16.0, 3)] == [[0]]
    assert clips_of(np.array([0.0]), 2, 16.0, 3) == []


@pytest.mark.parametrize(
    ("most", "firsts"), [(1, [8]), (2, [2, 13]), (4, [0, 5, 10, 15]), (9, [0, 5, 10, 15])]
)
def test_clips_of_a_long_video_are_spread_over_it_and_never_overlap(most, firsts):
    clips = clips_of(np.arange(21) / 8, 5, 8.0, most)
    assert [int(clip[0]) for clip in clips] == firsts
    assert all(clip.tolist() == list(range(clip[0], clip[0] + 5)) for clip in clips)


def test_without_a_rate_the_whole_video_is_thinned_as_in_the_release():
    (clip,) = clips_of(np.arange(13) / 8, 5, 0.0, 1)
    assert clip.tolist() == [0, 2, 4, 6, 8]
    assert clips_of(np.arange(4) / 8, 5, 0.0, 1) == []


@pytest.mark.parametrize(
    ("video", "expected"),
    [
        ((100, 480, 832), "49x480x832"),
        ((100, 1080, 1920), "49x480x832"),
        ((100, 1920, 1080), "49x832x480"),
        ((30, 720, 1280), "17x480x832"),
        ((30, 1280, 720), None),
        ((100, 500, 500), "49x480x480"),
        ((100, 250, 250), "49x240x240"),
    ],
)
def test_a_video_goes_to_the_bucket_that_loses_least_of_it(video, expected):
    names = ("49x480x832", "17x480x832", "49x832x480", "49x480x480", "49x240x240")
    sizes = [parse_size(name) for name in names]
    if expected is None:  # The only long ones are upright.
        sizes = sizes[2:]
    found = best_size(sizes, *video)
    assert (found and str(found)) == expected


def test_where_a_clip_is_cut_is_a_function_of_its_name():
    cut = Cut((Size(5, 32, 48),), 8.0, 2, "random")
    places = [corner(cut, file, clip) for file in ("a.mp4", "b.mp4") for clip in (0, 1)]
    assert len(set(places)) == 4
    assert places[0] == corner(cut, "a.mp4", 0)
    assert all(0 <= x < 1 for place in places for x in place)
    assert corner(cut._replace(crop="centre"), "a.mp4", 0) == (0.5, 0.5)


@pytest.mark.parametrize(
    ("buckets", "message"),
    [
        (("49x480",), "a bucket is '49x480', expected frames x height x width"),
        (("0x8x8",), "expected frames x height x width"),
        ((8,), "a bucket is 8"),
        (("5x8x8", "5x8x8"), "names a bucket twice"),
    ],
)
def test_a_bucket_that_is_none_is_told(buckets, message):
    with pytest.raises(UserError, match=message):
        cut_of({**DATA, "buckets": buckets, "clips_per_video": 1})


def test_frames_are_read_by_the_clock_of_the_file(tmp_path):
    greys, times = [20, 60, 100, 140, 180], [0.0, 0.1, 0.2, 1.0, 1.1]
    path = write_grey(tmp_path / "uneven.mp4", greys, times)
    survey = survey_video(path)
    np.testing.assert_allclose(survey.times, times, atol=1e-3)
    assert (survey.height, survey.width) == (32, 32)
    assert greys_of(path, [0, 0, 1, 3, 4]) == pytest.approx([20, 20, 60, 140, 180], abs=2)
    assert greys_of(path, [2]) == pytest.approx([100], abs=2)


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi", "ts", "mov", "flv"])
def test_every_container_gives_the_same_frames(tmp_path, suffix):
    greys = list(range(10, 250, 20))
    path = write_grey(tmp_path / f"video.{suffix}", greys)
    survey = survey_video(path)
    np.testing.assert_allclose(np.diff(survey.times), 0.1, atol=2e-3)
    assert greys_of(path, range(12)) == pytest.approx(greys, abs=2)


def test_frames_without_a_clock_of_their_own_are_counted(tmp_path):
    # An AVI file has a place for every tick, most of them empty here: two frames get one number.
    path = write_grey(tmp_path / "video.avi", [20, 60, 100, 140], [0.0, 0.1, 0.2, 0.3])
    survey = survey_video(path)
    assert not survey.clocked
    assert survey.stamps.tolist() == [0, 1, 2, 3]
    assert greys_of(path, [1, 3]) == pytest.approx([60, 140], abs=2)


def upright(tmp_path, degrees):
    """A phone's film: its left half is white as it lies; the file says how to turn it."""
    path, half = tmp_path / f"{degrees}.mp4", np.zeros((32, 64, 3), np.uint8)
    half[:, :32] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.options = 32, 64, {"crf": "0"}
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        container.mux(stream.encode())
    set_matrix(path, degrees)
    return path


def set_matrix(path, degrees):
    """Writes the display matrix into the track header of an mp4 file (ISO 14496-12, 8.3.2)."""
    cos, sin = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 4 + 20 + 8 + 8
    for place, value in zip((0, 4, 12, 16), (cos, sin, -sin, cos), strict=True):
        data[start + place : start + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("degrees", "size"), [(0, (32, 64)), (90, (64, 32)), (180, (32, 64)), (270, (64, 32))]
)
def test_a_phones_video_stands_upright(tmp_path, degrees, size):
    """Turned clockwise by so much, as players show it."""
    path = upright(tmp_path, degrees)
    survey = survey_video(path)
    assert (survey.height, survey.width) == size
    cover = tuple(side // 2 for side in size)
    frame = read_frames(path, survey, [1], cover)[0]
    assert frame.shape == (*cover, 3)
    bright = np.zeros(cover, bool)
    half = {0: np.s_[:, :16], 90: np.s_[:16], 180: np.s_[:, 16:], 270: np.s_[16:]}[degrees]
    bright[half] = True
    assert frame[bright].mean() > 235
    assert frame[~bright].mean() < 20


def test_pixels_that_are_not_square_are_stretched(tmp_path):
    path, half = tmp_path / "pal.mp4", np.zeros((32, 32, 3), np.uint8)
    half[:, :16] = 255
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.height, stream.width, stream.options = 32, 32, {"crf": "0"}
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(half, format="rgb24")))
        container.mux(stream.encode())
    survey = survey_video(path)
    assert (survey.height, survey.width) == (32, 64)
    frame = read_frames(path, survey, [0], (32, 64))[0]
    assert frame[:, :28].min() > 230
    assert frame[:, 36:].max() < 20


def test_a_place_other_than_the_centre_is_cut(tmp_path):
    path, wide = tmp_path / "wide.mp4", np.zeros((1, 16, 48, 3), np.uint8)
    wide[:, :, 32:] = 255
    write_video(path, wide, 8, crf=0)
    survey = survey_video(path)
    right = read_frames(path, survey, [0], (16, 16), [(0.5, 0.99)])[0]
    left = read_frames(path, survey, [0], (16, 16), [(0.5, 0.0)])[0]
    assert right.mean() > 230
    assert left.max() < 20
    both = read_frames(path, survey, [0, 0, 0], (16, 16), [(0.5, 0.0), (0.5, 0.99), (0.5, 0.0)])
    assert [frame.mean() > 100 for frame in both] == [False, True, False]


def test_a_video_that_loses_its_end_while_it_is_read_is_told(tmp_path):
    path = write_grey(tmp_path / "whole.mkv", range(10, 250, 8))
    survey = survey_video(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=r"whole.mkv is damaged|does not decode"):
        read_frames(path, survey, [0, len(survey.times) - 1], (16, 16))


def test_a_clock_that_runs_for_days_is_refused(tmp_path):
    path = write_grey(tmp_path / "days.mkv", [20, 60], [0.0, 90_000.0])
    with pytest.raises(UserError, match="says that it lasts 90000 s, expected at most 86400"):
        survey_video(path)
