"""How close a video is to full precision's, and how steady and lively it is, from pixels alone.

No learned network: these tell broken from whole, and near from far. Whether a video is good is the
judge's to say in the tiny world, and VBench's elsewhere.
"""

import numpy as np
from skimage.metrics import mean_squared_error, structural_similarity

SAME = 100.0
"""dB of a video without any difference, whose ratio would be infinite. One level in one value of a
17-frame, 64 x 64 video is 101 dB."""


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Peak signal-to-noise ratio of whole videos, dB, at most `SAME`.

    Args:
        ours, theirs: uint8 `[frames, height, width, 3]`.
    """
    error = mean_squared_error(theirs, ours)
    return SAME if error == 0 else min(float(10 * np.log10(255**2 / error)), SAME)


def ssim(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Structural similarity, mean over frames: Wang et al. 2004, Gaussian window, per channel.

    Args:
        ours, theirs: uint8 `[frames, height, width, 3]`, at least 11 x 11 pixels.
    """
    how = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    frames = [
        structural_similarity(a, b, channel_axis=-1, data_range=255, **how)
        for a, b in zip(theirs, ours, strict=True)
    ]
    return float(np.mean(frames))


def consistency(video: np.ndarray) -> float:
    """Mean cosine of successive frames as vectors of pixels, 0 to 1; NaN of a single frame.

    Args:
        video: uint8 `[frames, height, width, 3]`.
    """
    if len(video) < 2:
        return float("nan")
    # Black has a direction, too: levels from 1 to 256.
    frames = video.reshape(len(video), -1).astype(np.float64) + 1
    lengths = np.linalg.norm(frames, axis=1)
    products = np.einsum("fp,fp->f", frames[1:], frames[:-1])
    return float((products / (lengths[1:] * lengths[:-1])).mean())


def motion(video: np.ndarray) -> float:
    """Mean absolute change of a pixel's value from frame to frame, levels; NaN of a single frame.

    Args:
        video: uint8 `[frames, height, width, 3]`.
    """
    if len(video) < 2:
        return float("nan")
    return float(np.abs(np.diff(video.astype(np.int16), axis=0)).mean())
