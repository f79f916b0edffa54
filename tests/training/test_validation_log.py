"""What a validation leaves on disk and in TensorBoard, and what of it a resumed run drops."""

import io
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from qvgen_jax.data.video import write_video
from qvgen_jax.training.metrics import MetricWriter
from qvgen_jax.training.validation import Validated, told

LAYERS = {
    "blocks.0.up": {"weight_error": 0.125, "branch_norm": None},
    "blocks.1.up": {"weight_error": 0.25, "branch_norm": None},
}
SCALARS = {
    "held_out_loss": 0.5,
    "drift": 0.75,
    "weight_error": 0.1875,
    "weight_error_worst": 0.25,
    "validation_seconds": 3.14,
}


def filmed(workdir: Path, step: int, width: int = 32) -> Validated:
    """Videos that grow brighter, the teacher's red and the student's blue."""
    row = {"prompt": "a star", "seed": 7}
    for side, folder, channel in (("teacher", "teacher", 0), ("student", str(step), 2)):
        row[side] = f"validation/{folder}/star.mp4"
        (workdir / row[side]).parent.mkdir(parents=True, exist_ok=True)
        frames = np.zeros((5, 16, width, 3), np.uint8)
        frames[..., channel] = np.array([40, 80, 120, 160, 200])[:, None, None]
        write_video(workdir / row[side], frames, fps=8)
    return Validated(SCALARS, {"layers": LAYERS, "videos": [row]}, fps=8)


def validate(workdir: Path, start: int, steps: list[int], **size: int) -> None:
    with MetricWriter(workdir, start, 9) as writer:
        for step in steps:
            found = filmed(workdir, step, **size)
            writer.validated(step, found)
            writer.write(step, found.scalars)


def events(workdir: Path) -> list[Event]:
    """All events of TensorBoard's files: length, checksum, event, checksum."""
    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            found.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return found


def test_a_resumed_run_drops_the_rows_and_videos_that_come_again(tmp_path):
    validate(tmp_path, 0, [1, 3, 5])
    validate(tmp_path, 4, [])  # From the checkpoint after update 3.
    rows = [json.loads(line) for line in (tmp_path / "validation.jsonl").open()]
    assert [row["step"] for row in rows] == [1, 3]
    folders = {path.name for path in (tmp_path / "validation").iterdir()}
    assert folders == {"teacher", "1", "3"}


@pytest.mark.parametrize(("width", "shown"), [(32, (64, 16)), (512, (512, 8))])
def test_tensorboard_plays_both_videos_beside_each_other_in_a_moderate_size(tmp_path, width, shown):
    validate(tmp_path, 0, [3], width=width)
    values = [(e.step, v) for e in events(tmp_path) for v in e.summary.value if v.image.width]
    ((step, value),) = values
    assert step == 3
    assert value.tag == "validation/a star, seed 7"
    assert (value.image.width, value.image.height) == shown
    film = Image.open(io.BytesIO(value.image.encoded_image_string))
    assert (film.n_frames, film.size) == (5, shown)
    assert film.info["duration"] == 120  # GIF counts in hundredths of a second: 125 is cut.
    film.seek(4)
    frame = np.asarray(film.convert("RGB"), np.int32)
    for half, channel in ((frame[:, : shown[0] // 2 - 4], 0), (frame[:, shown[0] // 2 + 4 :], 2)):
        # H.264 in 4:2:0 and a palette: within a tenth of 200.
        assert np.abs(half - np.eye(3, dtype=int)[channel] * 200).max() < 20


def test_the_worst_layer_is_named(tmp_path):
    assert told(filmed(tmp_path, 3)) == (
        "validation: held-out loss 0.5; drift 0.75; weights off by 0.188, most in blocks.1.up by "
        "0.25; 3.1 s"
    )
