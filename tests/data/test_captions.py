import pytest

from qvgen_jax.data.captions import CaptionedFile, read_captions
from qvgen_jax.errors import UserError


@pytest.mark.parametrize(
    "files",
    [
        {"captions.jsonl": '{"file": "a.mp4", "caption": "x, y"}\n{"file":"b.mp4","caption":"z"}'},
        {"captions.csv": 'caption,file\n"x, y",a.mp4\nz,b.mp4\n'},
        {"videos.txt": "a.mp4\nb.mp4\n", "prompts.txt": "x, y\nz\n"},
        {"videos.txt": "a.mp4\n\nb.mp4", "captions.txt": "x, y\nz"},
    ],
)
def test_all_ways_of_listing_captions_read_the_same(tmp_path, files):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert read_captions(tmp_path) == [CaptionedFile("a.mp4", "x, y"), CaptionedFile("b.mp4", "z")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no captions file: expected captions.jsonl"),
        ({"captions.jsonl": "\n"}, "lists no videos"),
        ({"captions.jsonl": '{"file": "a.mp4", "caption": "x"}\n{oh'}, "line 2 is not JSON"),
        ({"captions.jsonl": '{"file": "a.mp4"}'}, "line 1 has no 'caption'"),
        ({"captions.jsonl": "[1]"}, "line 1 has no 'file'"),
        ({"captions.csv": "file,words\na.mp4,x\n"}, "line 2 has no 'caption'"),
        ({"captions.jsonl": "[" * 100_000}, "line 1 is not JSON"),
        ({"captions.jsonl": '{"file": %s}' % ("9" * 5000)}, "line 1 is not JSON"),
        ({"captions.jsonl": '{"file": "../a.mp4", "caption": "x"}'}, "a file inside the folder"),
        ({"captions.jsonl": '{"file": "/a.mp4", "caption": "x"}'}, "a file inside the folder"),
        ({"captions.jsonl": '{"file": "", "caption": "x"}'}, "a file inside the folder"),
        ({"captions.jsonl": '{"file": "a\\u0000", "caption": "x"}'}, "a file inside the folder"),
        ({"captions.jsonl": '{"file": "a\\ud800", "caption": "x"}'}, "a file inside the folder"),
        ({"captions.jsonl": '{"file": "a", "caption": "\\ud800"}'}, "line 1 .* is not Unicode"),
        ({"videos.txt": "a.mp4\nb/../../c", "captions.txt": "x\ny"}, "line 2 names 'b/../../c'"),
        ({"captions.csv": f"file,caption\na.mp4,{'x' * 200_000}\n"}, "is not CSV"),
        ({"captions.csv": f"file,caption\na.mp4,{'x' * 100_001}\n"}, "100001 characters"),
        ({"videos.txt": "a.mp4"}, "no captions beside it"),
        ({"videos.txt": "a.mp4\nb.mp4", "captions.txt": "x"}, "2 videos and captions.txt 1"),
    ],
)
def test_a_missing_or_malformed_captions_file_is_a_clear_error(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_captions(tmp_path)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        read_captions(tmp_path / "nowhere")
