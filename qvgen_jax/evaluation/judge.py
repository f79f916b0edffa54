"""Reads shape, colour, direction and speed from a clip's pixels, with nothing learned.

The background is what the border shows; what differs from it is the foreground. Its centroid's
track gives the direction, its mean hue the nearest colour, and its outline is compared with
templates that the data set's own renderer drew, at the best-fitting centre and size.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from qvgen_jax.data.moving_shapes import (
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SPEEDS,
    Attributes,
    coverage,
)

STRICT_IOU = 0.75  # A strict match needs more than this with the true shape's template.

_SHAPE_IOU = 0.5  # Below this the foreground is no shape at all.
_CONTRAST = 48.0  # Euclidean RGB distance to the background under which there is no foreground.
_BRIGHTEST = 64  # Pixels that set a frame's contrast; the smallest star covers 180.
_SATURATION = 0.4  # Of the named colour's; a foreground greyer than this has no colour.
_AREA = (60, 900)  # Pixels of a believable foreground, among the 64 x 64.
_STANDSTILL = 0.2  # Pixels per frame under which a shape does not move.
_WINDOW = 36  # Templates are compared in this square around the rounded centroid.
_OFFSETS = np.linspace(-1.0, 1.0, 5)  # Centres tried around it, pixels, per axis.
_RADII = np.arange(7.5, 13.01, 0.25)


class Verdict(NamedTuple):
    """What a clip shows; None where there is nothing to name.

    Attributes:
        shape, colour, direction, speed: names of `moving_shapes`.
        ious: shape -> IoU with its best-fitting template, mean over all frames.
        velocity: (x, y) in pixels per frame, y down; zeros where there is no track.
    """

    shape: str | None
    colour: str | None
    direction: str | None
    speed: str | None
    ious: dict[str, float]
    velocity: tuple[float, float]


def judge(video: np.ndarray) -> Verdict:
    """Judges one clip, uint8 `[frames, height, width, 3]`, shapes being 8 to 13 pixels in radius.

    Raises:
        ValueError: the array is of another type or rank, or the frame is smaller than 32 x 32.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(
            f"judge takes uint8 [frames, height, width, 3], got {video.dtype} {list(video.shape)}"
        )
    if min(video.shape[1:3]) < 32:
        raise ValueError(f"judge needs frames of 32 x 32 or more, got {list(video.shape)}")
    mask, core = _foreground(video.astype(np.float32))
    centroids, seen = _centroids(mask)
    velocity = _velocity(centroids, seen)
    ious = dict(zip(SHAPES, map(float, _template_ious(mask, centroids, seen)), strict=True))
    best = max(ious, key=ious.get)
    pace = float(np.hypot(*velocity))
    moves = pace > _STANDSTILL
    return Verdict(
        shape=best if ious[best] >= _SHAPE_IOU else None,
        colour=_colour(video, core, seen),
        direction=_direction(velocity) if moves else None,
        speed=_speed(pace) if moves else None,
        ious=ious,
        velocity=(float(velocity[0]), float(velocity[1])),
    )


def plain(verdict: Verdict, attributes: Attributes) -> bool:
    """Shape, colour and direction are all right."""
    return (verdict.shape, verdict.colour, verdict.direction) == attributes[:3]


def strict(verdict: Verdict, attributes: Attributes) -> bool:
    """`plain`, and the outline matches the true shape's template: IoU > 0.75, mean over frames."""
    return plain(verdict, attributes) and verdict.ious[attributes.shape] > STRICT_IOU


def _foreground(video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two masks `[frames, height, width]`: the whole foreground, and its full-contrast core."""
    border = np.concatenate(
        (video[:, 0], video[:, -1], video[:, 1:-1, 0], video[:, 1:-1, -1]), axis=1
    )
    background = np.median(border, axis=1)[:, None, None]
    distance = np.sqrt(np.square(video - background).sum(-1))
    flat = distance.reshape(len(video), -1)
    brightest = np.partition(flat, flat.shape[1] - _BRIGHTEST, axis=1)[:, -_BRIGHTEST:]
    contrast = brightest.mean(1)[:, None, None]
    visible = contrast > _CONTRAST
    return visible & (distance > 0.5 * contrast), visible & (distance > 0.85 * contrast)


def _centroids(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Centroid (x, y) `[frames, 2]` in pixels, and which frames have a believable foreground."""
    height, width = mask.shape[1:]
    area = mask.sum((1, 2))
    scale = height * width / 64**2
    seen = (area >= _AREA[0]) & (area <= _AREA[1] * max(scale, 1.0))
    x = mask.sum(1) @ (np.arange(width) + 0.5)
    y = mask.sum(2) @ (np.arange(height) + 0.5)
    return np.stack((x, y), 1) / np.maximum(area, 1)[:, None], seen


def _velocity(centroids: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Median of the slopes between all pairs of frames: a few bad frames do not turn it."""
    times = np.flatnonzero(seen)
    if len(times) < 2 or 2 * len(times) < len(seen):
        return np.zeros(2)
    first, second = np.triu_indices(len(times), k=1)
    steps = centroids[times[second]] - centroids[times[first]]
    return np.median(steps / (times[second] - times[first])[:, None], axis=0)


def _direction(velocity: np.ndarray) -> str:
    return max(DIRECTIONS, key=lambda name: float(np.dot(velocity, DIRECTIONS[name])))


def _speed(pace: float) -> str:
    return min(SPEEDS, key=lambda name: abs(pace - np.mean(SPEEDS[name])))


def _colour(video: np.ndarray, core: np.ndarray, seen: np.ndarray) -> str | None:
    """The nearest hue of the palette: brightness and background tint may be off."""
    if 2 * seen.sum() < len(seen) or not seen.any():
        return None
    weights = core[seen][..., None]
    count = np.maximum(weights.sum((1, 2)), 1)
    mean = np.median((video[seen] * weights).sum((1, 2)) / count, axis=0)
    chroma = mean - mean.mean()
    hues = {name: np.array(rgb) - np.mean(rgb) for name, rgb in COLOURS.items()}
    likeness = {name: chroma @ hue / (hue @ hue) for name, hue in hues.items()}
    angle = {name: likeness[name] * np.linalg.norm(hue) for name, hue in hues.items()}
    nearest = max(angle, key=angle.get)
    return nearest if likeness[nearest] > _SATURATION else None


def _template_ious(mask: np.ndarray, centroids: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """`[shapes]`: the best template's IoU per frame, averaged; a frame that shows nothing is 0."""
    ious = np.zeros((len(mask), len(SHAPES)), np.float32)
    if seen.any():
        templates, areas = _templates()
        half = _WINDOW // 2
        padded = np.pad(mask[seen], ((0, 0), (half, half), (half, half)))
        windows = sliding_window_view(padded, (_WINDOW, _WINDOW), axis=(1, 2))
        left, top = np.round(centroids[seen]).astype(int).T
        crops = windows[np.arange(len(left)), top, left].reshape(len(left), -1)
        both = (crops.astype(np.float32) @ templates).reshape(len(left), len(SHAPES), -1)
        either = mask[seen].sum((1, 2))[:, None, None] + areas - both
        ious[seen] = (both / either).max(-1)
    return ious.mean(0)


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """All outlines to try: `[window * window, shapes * candidates]`, areas `[shapes, candidates]`.

    One matrix product then compares a frame with every shape, size and centre at once.
    """
    centres = np.stack(np.meshgrid(_OFFSETS, _OFFSETS), -1).reshape(-1, 2) + _WINDOW / 2
    outlines = np.stack(
        [
            np.concatenate([coverage(shape, radius, centres, _WINDOW) for radius in _RADII])
            for shape in SHAPES
        ]
    )
    outlines = (outlines >= 0.5).astype(np.float32).reshape(len(SHAPES), -1, _WINDOW**2)
    return outlines.reshape(-1, _WINDOW**2).T.copy(), outlines.sum(-1)
