"""Reads video files, one path a line, and answers what each holds: FFmpeg may crash or hang, and
then only this process does."""

import contextlib
import hashlib
import json
import sys
import traceback

import av

from qvgen_jax.data.clips import clips_of
from qvgen_jax.data.video import read_frames, read_video, survey_video
from qvgen_jax.errors import UserError


def outcome(path: str) -> dict:
    """`refused` with the message, `shape` and a digest of every frame, or `crashed`."""
    try:
        with contextlib.suppress(UserError):  # It may be read whole though no clip can be cut.
            cut(path)
        video = read_video(path)
    except UserError as error:
        return {"refused": str(error)}
    except BaseException:
        return {"crashed": traceback.format_exc()}
    frames = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in video]
    return {"shape": video.shape, "frames": frames}


def cut(path: str) -> None:
    """As encoding does, two clips of nine frames at eight a second."""
    survey = survey_video(path)
    for indices in clips_of(survey.times, 9, 8.0, 2):
        video = read_frames(path, survey, indices, (64, 64), [(0.3, 0.7)] * 9)
        assert video.shape == (9, 64, 64, 3)


if __name__ == "__main__":
    av.logging.set_level(av.logging.PANIC)
    for line in sys.stdin:
        print(json.dumps(outcome(line.rstrip("\n"))), flush=True)
