import json
import shutil

import pytest
from ml_collections import ConfigDict

from qvgen_jax.data.prepare import ensure_encoded
from qvgen_jax.errors import UserError

SIZE = {"num_frames": 5, "height": 32, "width": 32, "max_length": 8}
HOW = {"buckets": (), "fps": 0.0, "clips_per_video": 1, "crop": "centre"}
FOUND = {"buckets": ["5x32x32"], "fps": 0.0, "max_length": 8}


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
