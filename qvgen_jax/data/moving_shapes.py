"""The tiny pipeline's world: short clips of one moving shape, each with the caption that says it.

Everything is a pure function of its seed, so a data set is its command line:

    python -m qvgen_jax.data.moving_shapes --out data/shapes --count 4096 --seed 0

A quarter of the (shape, colour, direction) triples is held out: a model that draws them right has
composed words that it never saw together. Every *pair* of values is seen in training.
"""

import argparse
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qvgen_jax.data.video import write_video

SHAPES = ("circle", "square", "triangle", "cross", "star")
COLOURS = {
    "red": (230, 30, 30),
    "green": (30, 190, 30),
    "blue": (40, 50, 230),
    "yellow": (235, 220, 20),
    "magenta": (220, 30, 210),
    "cyan": (20, 205, 215),
}
DIRECTIONS = {  # Unit steps in image coordinates: x to the right, y down.
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-right": (0.5**0.5, -(0.5**0.5)),
    "up-left": (-(0.5**0.5), -(0.5**0.5)),
    "down-right": (0.5**0.5, 0.5**0.5),
    "down-left": (-(0.5**0.5), 0.5**0.5),
}
SPEEDS = {"slowly": (0.5, 0.6), "quickly": (1.2, 1.35)}  # Pixels per frame.
BACKGROUNDS = {"black": (0, 0, 0), "gray": (128, 128, 128), "white": (255, 255, 255)}

SIZE = 64
FRAMES = 17
FPS = 8
RADIUS = (9.0, 11.0)
SPREAD = 4.0  # The middle of the path lies within this many pixels of the frame's, per axis.
HELD_OUT = 60  # Of 240 triples.

_SUPERSAMPLE = 4
_WINDOW = 32  # Only this square around the centre is supersampled: no shape reaches further.


class Attributes(NamedTuple):
    """What a caption says; every field is one of the names above."""

    shape: str
    colour: str
    direction: str
    speed: str
    background: str


def caption(attributes: Attributes) -> str:
    """The sentence that describes a clip, for example "a red star moving up slowly on a ..."."""
    a = attributes
    return f"a {a.colour} {a.shape} moving {a.direction} {a.speed} on a {a.background} background"


def render(attributes: Attributes, rng: np.random.Generator, spread: float = SPREAD) -> np.ndarray:
    """Draws one clip; radius, position (within `spread`) and exact speed come from `rng`.

    Returns:
        uint8 `[17, 64, 64, 3]`. The shape is inside the frame all the time.
    """
    radius = rng.uniform(*RADIUS)
    speed = rng.uniform(*SPEEDS[attributes.speed])
    middle = SIZE / 2 + rng.uniform(-spread, spread, size=2)
    travelled = (np.arange(FRAMES) - (FRAMES - 1) / 2) * speed
    centres = middle + travelled[:, None] * np.array(DIRECTIONS[attributes.direction])
    alpha = coverage(attributes.shape, radius, centres)[..., None]
    colour = np.array(COLOURS[attributes.colour], np.float32)
    background = np.array(BACKGROUNDS[attributes.background], np.float32)
    return np.round(background + alpha * (colour - background)).astype(np.uint8)


def coverage(shape: str, radius: float, centres: np.ndarray, size: int = SIZE) -> np.ndarray:
    """The share of every pixel that a shape covers, by supersampling.

    Args:
        shape: one of `SHAPES`.
        radius: the nominal radius in pixels; shapes of one radius have similar areas.
        centres: `[frames, 2]` centroid (x, y) in pixels, the frame's corner being (0, 0).
        size: width and height of the frame in pixels.

    Returns:
        float32 `[frames, size, size]` in [0, 1].
    """
    centres = np.asarray(centres, np.float64)
    corners = np.floor(centres).astype(int) - _WINDOW // 2
    samples = (np.arange(_WINDOW * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    x = samples[None, None, :] + (corners - centres)[:, 0, None, None]
    y = samples[None, :, None] + (corners - centres)[:, 1, None, None]
    inside = _inside(shape, radius, x, y)
    tiles = inside.reshape(len(centres), _WINDOW, _SUPERSAMPLE, _WINDOW, _SUPERSAMPLE)
    tiles = tiles.mean((2, 4), dtype=np.float32)
    padded = np.zeros((len(centres), size + 2 * _WINDOW, size + 2 * _WINDOW), np.float32)
    corners = np.clip(corners + _WINDOW, 0, size + _WINDOW)
    for frame, tile, (left, top) in zip(padded, tiles, corners, strict=True):
        frame[top : top + _WINDOW, left : left + _WINDOW] = tile
    return padded[:, _WINDOW:-_WINDOW, _WINDOW:-_WINDOW]


def _inside(shape: str, radius: float, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    if shape == "circle":
        return x**2 + y**2 < radius**2
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) < 0.886 * radius
    if shape == "cross":
        longer, shorter = np.maximum(np.abs(x), np.abs(y)), np.minimum(np.abs(x), np.abs(y))
        return (longer < 1.12 * radius) & (shorter < 0.37 * radius)
    if shape == "triangle":
        return _inside_star(x, y, tips=3, outer=1.3 * radius, inner=0.65 * radius)
    if shape == "star":
        return _inside_star(x, y, tips=5, outer=1.3 * radius, inner=0.585 * radius)
    raise ValueError(f"shape {shape!r} is not one of {', '.join(SHAPES)}")


def _inside_star(
    x: np.ndarray, y: np.ndarray, *, tips: int, outer: float, inner: float
) -> np.ndarray:
    """A star with one tip up; with `inner = outer * cos(pi / tips)` a regular polygon."""
    half = np.pi / tips
    angle = np.arctan2(x, -y)  # From "up", so that a tip lies at angle zero.
    folded = np.abs(np.mod(angle + half, 2 * half) - half)
    distance = np.hypot(x, y)
    along, across = distance * np.cos(folded), distance * np.sin(folded)
    # Below the line from the tip (outer, 0) to the notch at angle `half`.
    notch = inner * np.cos(half), inner * np.sin(half)
    return (along - outer) * notch[1] + across * (outer - notch[0]) < 0


def triples() -> tuple[tuple[tuple[str, str, str], ...], tuple[tuple[str, str, str], ...]]:
    """The (shape, colour, direction) triples: those to train on (180), those held out (60).

    The split is by hash, so that it never changes with a random generator's version; the first
    salt after which every pair of values is still seen in training is taken.
    """
    everything = list(itertools.product(SHAPES, COLOURS, DIRECTIONS))
    for salt in itertools.count():
        ranked = sorted(everything, key=lambda triple: _digest(salt, *triple))
        train, held_out = ranked[HELD_OUT:], ranked[:HELD_OUT]
        if _pairs(train) == _pairs(everything):
            return tuple(sorted(train)), tuple(sorted(held_out))
    raise AssertionError("unreachable")


def _pairs(items: Sequence[tuple[str, str, str]]) -> set[tuple[str, str]]:
    return {pair for triple in items for pair in itertools.combinations(triple, 2)}


def _digest(*words: object) -> str:
    return hashlib.sha256(" ".join(map(str, words)).encode()).hexdigest()


def held_out_prompts() -> tuple[Attributes, ...]:
    """All 360 held-out descriptions (60 triples, 2 speeds, 3 backgrounds), in one fixed order.

    The order is mixed, so that any first few of them are a fair sample.
    """
    everything = [
        Attributes(*triple, speed, background)
        for triple in triples()[1]
        for speed in SPEEDS
        for background in BACKGROUNDS
    ]
    return tuple(sorted(everything, key=lambda attributes: _digest(*attributes)))


def example(
    index: int, *, seed: int, split: str = "train", spread: float = SPREAD
) -> tuple[np.ndarray, Attributes]:
    """Clip number `index` of the endless data set `seed`: uint8 `[17, 64, 64, 3]` and its facts.

    Triples come round in shuffled passes, so that a small data set is a balanced one.
    """
    allowed = triples()[("train", "heldout").index(split)]
    turn, place = divmod(index, len(allowed))
    order = np.random.default_rng([seed, turn, 0]).permutation(len(allowed))
    rng = np.random.default_rng([seed, index, 1])
    speed, background = rng.choice(list(SPEEDS)), rng.choice(list(BACKGROUNDS))
    attributes = Attributes(*allowed[order[place]], str(speed), str(background))
    return render(attributes, rng, spread), attributes


def write_folder(
    out: str | Path, *, count: int, seed: int, split: str = "train", spread: float = SPREAD
) -> None:
    """Writes `count` mp4 files and `captions.jsonl`, one line {"file", "caption"} per clip."""
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(count):
        video, attributes = example(index, seed=seed, split=split, spread=spread)
        name = f"{index:05d}.mp4"
        write_video(out / name, video, FPS)
        lines.append(json.dumps({"file": name, "caption": caption(attributes)}) + "\n")
    (out / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """The command line: see the module's docstring."""
    parser = argparse.ArgumentParser(description="Write clips of moving shapes with captions.")
    parser.add_argument("--out", required=True, help="the folder to write to")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument(
        "--spread", type=float, default=SPREAD, help="pixels from the middle, up to 6"
    )
    write_folder(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
