"""Videos that are not read: damaged, cut short, too large, or no videos but lists of others."""

import re
from pathlib import Path

import av
import numpy as np
import pytest

from qvgen_jax.data import video
from qvgen_jax.data.video import read_video, write_video
from qvgen_jax.errors import UserError

CLIP = Path(__file__).parents[2] / "assets/clips/00000.mp4"


@pytest.fixture
def clip(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CLIP.read_bytes())
    return path


def test_a_video_with_one_wrong_byte_is_refused_though_ffmpeg_shows_something(clip):
    data = bytearray(clip.read_bytes())
    data[data.index(b"mdat") + 2100] ^= 0xFF
    clip.write_bytes(data)
    with av.open(str(clip)) as container:
        assert len(list(container.decode(video=0))) == 17
    with pytest.raises(UserError, match=r"clip.mp4 is damaged: frame \d+ does not decode: remove"):
        read_video(clip)


def test_a_video_that_ends_inside_of_its_data_is_refused(tmp_path):
    path = tmp_path / "index_first.mp4"
    frames = read_video(CLIP)
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.options = 64, 64, {"bf": "0", "g": "1"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    assert read_video(path).shape == frames.shape
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(UserError, match="is cut short"):
        read_video(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "list.m3u8",
            "#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:2,\nclip.mp4\n#EXT-X-ENDLIST\n",
        ),
        ("list.mp4", "ffconcat version 1.0\nfile clip.mp4\n"),
    ],
)
def test_a_list_of_videos_is_none_whatever_it_is_called(clip, name, text):
    path = clip.with_name(name)
    path.write_text(text)
    with av.open(str(path)) as container:  # FFmpeg itself follows it.
        assert container.streams.video
    with pytest.raises(UserError, match="does not decode as a video"):
        read_video(path)


def test_a_name_is_never_an_address(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        read_video("http:/localhost/clip.mp4")


def test_more_pixels_than_any_video_has_are_refused(clip, monkeypatch):
    monkeypatch.setattr(video, "MOST_PIXELS", 64 * 63)
    with pytest.raises(UserError, match="frames of 64 x 64 pixels, expected at most 4032"):
        read_video(clip)


def test_a_line_of_pixels_is_not_scaled_to_a_plain(tmp_path):
    path = tmp_path / "line.mp4"
    write_video(path, np.zeros((2, 16, 8192, 3), np.uint8), fps=8)
    with pytest.raises(UserError, match=r"frames of 2160 x \d+ pixels, expected at most"):
        read_video(path, cover=(2160, 3840))


def test_more_frames_than_memory_has_room_for_are_refused(clip, monkeypatch):
    monkeypatch.setattr(video, "MOST_BYTES", 5 * 64 * 64 * 3)
    with pytest.raises(UserError, match=r"more than 5 frames, .* cut it into shorter videos"):
        read_video(clip)


def test_a_codec_that_is_unknown_is_named(clip):
    clip.write_bytes(re.sub(b"avc1(?=\0{6})", b"xyz1", clip.read_bytes()))
    with pytest.raises(UserError, match="codec that is not known"):
        read_video(clip)


def test_a_tag_that_is_no_text_is_passed_over(tmp_path):
    data = CLIP.read_bytes()
    assert b"isomiso2avc1mp41" in data
    path = tmp_path / "tag.mp4"
    path.write_bytes(data.replace(b"isomiso2avc1mp41", b"isom\x80\xff\xcc2avc1mp41", 1))
    np.testing.assert_array_equal(read_video(path), read_video(CLIP))
