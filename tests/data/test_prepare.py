import json
import shutil

import pytest
from ml_collections import ConfigDict

import qvgen_jax
from configs import read_config
from qvgen_jax.data.encode import FORMAT_VERSION
from qvgen_jax.data.prepare import check_sizes, ensure_encoded
from qvgen_jax.errors import UserError
from qvgen_jax.training.check import check_config

SIZE = {"num_frames": 5, "height": 32, "width": 32, "max_length": 8}
HOW = {"buckets": (), "fps": 0.0, "clips_per_video": 1, "crop": "centre"}
HOW["on_the_fly"] = False
FOUND = {
    **{"format_version": FORMAT_VERSION, "buckets": ["5x32x32"], "fps": 0.0, "max_length": 8},
    **{"clips_per_video": 1, "crop": "centre"},
}


def config(source: str, encoded: str = "") -> ConfigDict:
    return ConfigDict({"data": {"source": source, "encoded": encoded, **SIZE, **HOW}})


@pytest.fixture
def finished(tmp_path):
    """The folder of an encoding that arrived without its videos."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(FOUND))
    return folder


def test_encoded_clips_are_used_where_the_videos_are_not(finished, tmp_path):
    assert ensure_encoded(config("", str(finished)), tmp_path, None) == finished
    assert ensure_encoded(config("/not/here", str(finished)), tmp_path, None) == finished
    shutil.copytree(finished, tmp_path / "run" / "encoded")
    assert ensure_encoded(config(""), tmp_path / "run", None) == tmp_path / "run" / "encoded"


def test_encoded_clips_of_another_size_are_refused(finished, tmp_path):
    other = config("", str(finished))
    other.data.height = 64
    message = r"buckets \['5x32x32'\], config\.data asks for \['5x64x32'\]"
    with pytest.raises(UserError, match=message):
        ensure_encoded(other, tmp_path, None)


def test_a_missing_data_path_names_the_option(tmp_path):
    with pytest.raises(UserError, match=r"--config\.data\.source=FOLDER"):
        ensure_encoded(config(""), tmp_path, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"clips_per_video": 3}, r"clips_per_video=3 needs a rate: .* set --config\.data\.fps"),
        ({"clips_per_video": 0}, "clips_per_video=0; expected a whole number from 1"),
        ({"fps": -1.0}, r"data\.fps=-1\.0; expected a number from 0"),
        ({"crop": "left"}, r"data\.crop=left; expected one of centre, random"),
        ({"buckets": ("17x64",)}, "a bucket is '17x64', expected frames x height x width"),
    ],
)
def test_a_wrong_cut_is_told_from_the_config_alone(data, message):
    config = read_config("configs/tiny_w4a4.py").to_dict()
    with pytest.raises(UserError, match=message):
        check_config({**config, "data": {**config["data"], **data}})


@pytest.mark.parametrize(
    ("bucket", "message"),
    [
        ("17x64x72", r"clips of 17x64x72: width is 72, expected a multiple of 16; use 64"),
        ("16x64x64", r"clips of 16x64x64: num_frames is 16, expected 1 plus a multiple of 4; use"),
    ],
)
def test_a_size_that_the_model_does_not_divide_is_told(bucket, message):
    config = read_config("configs/tiny_w4a4.py").to_dict()
    data = {**config["data"], "buckets": ("17x64x64", bucket)}
    with pytest.raises(UserError, match=message):
        check_sizes({**config, "data": data}, qvgen_jax.load("assets/tiny_wan"))
