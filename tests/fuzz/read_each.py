"""Reads video files, one path a line, and answers what each holds: FFmpeg may crash or hang, and
then only this process does."""

import hashlib
import json
import sys
import traceback

import av

from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError


def outcome(path: str) -> dict:
    """`refused` with the message, `shape` and a digest of every frame, or `crashed`."""
    try:
        video = read_video(path)
    except UserError as error:
        return {"refused": str(error)}
    except BaseException:
        return {"crashed": traceback.format_exc()}
    frames = [hashlib.sha256(frame.tobytes()).hexdigest() for frame in video]
    return {"shape": video.shape, "frames": frames}


if __name__ == "__main__":
    av.logging.set_level(av.logging.PANIC)
    for line in sys.stdin:
        print(json.dumps(outcome(line.rstrip("\n"))), flush=True)
