"""Videos side by side, played together by `gallery.js`, and copied beside the report's pages."""

import os
import shutil
from collections.abc import Sequence, Sized
from html import escape
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import av

from qvgen_jax.data.video import open_video
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.report.words import missing

MOST_TAKES = 24
MOST_STEPS = 5
TINY_WIDTH = 200  # Pixels; narrower videos are enlarged without smoothing.
_SIDES = {"teacher": "Teacher", "student": "Student"}
_ORDER = "same prompt and same seed, hence the same starting noise"
_SPEEDS = {"0.25": "¼ speed", "0.5": "½ speed", "1": "Speed 1", "2": "2 × speed"}


class Take(NamedTuple):
    """One prompt with one seed: `videos`, (label, path inside the workdir) each."""

    prompt: str
    seed: float
    videos: list[tuple[str, str]]


class Clip(NamedTuple):
    """A video that a page shows; sizes in pixels, `fps` frames a second."""

    address: str
    width: int
    height: int
    frames: int
    fps: float


class Shelf:
    """The report's copies of the videos that it shows, so that its folder is complete."""

    def __init__(self, workdir: Path, folder: Path):
        """`folder`: the report's. Raises UserError when an earlier report's copies stay there."""
        self._workdir, self._folder = workdir, folder / "videos"
        _remove(self._folder)

    def place(self, name: str) -> Clip | None:
        """Copies a file of the workdir; None when it is missing, no readable video, or a link leads
        out of the workdir."""
        source, copy = self._workdir / name, self._folder / name
        if not Path(os.path.realpath(source)).is_relative_to(os.path.realpath(self._workdir)):
            return None
        try:
            with open_video(source) as container:
                stream = container.streams.video[0]
                codec, rate = stream.codec_context, stream.average_rate
                if not codec or not rate or not stream.frames:
                    return None
                size = codec.width, codec.height, stream.frames, float(rate)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)
        except (OSError, IndexError, av.error.FFmpegError):
            return None
        return Clip(quote(f"videos/{name}"), *size)


def _remove(folder: Path) -> None:
    """Removes a folder with all in it, or a link, whose target stays as it is."""
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise UserError(
            f"{folder}, of an earlier report, cannot be removed ({error.strerror}); remove it"
        ) from error


def videos_section(samples: list[dict] | None, judged: list[dict] | None, shelf: Shelf) -> str:
    """What the run ended with: every variant that was judged, and the pairs that were sampled."""
    takes = [Take(each["prompt"], each["seed"], [*each["videos"].items()]) for each in judged or []]
    known = {(take.prompt, take.seed) for take in takes}
    for pair in samples or []:
        if (pair["prompt"], pair["seed"]) not in known:
            videos = [(label, f"samples/{pair[side]}") for side, label in _SIDES.items()]
            takes.append(Take(pair["prompt"], pair["seed"], videos))
    if not takes:
        return missing("No samples were generated (<code>samples/samples.json</code> is missing).")
    player = gallery(takes[:MOST_TAKES], shelf, "Videos")
    return f"<p>Side by side: {_ORDER}.{_first(takes)}</p>{player}"


def validation_videos(validations: Sequence[dict], shelf: Shelf) -> str:
    """The student's videos by step beside the teacher's; empty when no validation made any."""
    steps = [each for each in validations if each.get("videos")]
    spread = {round(i * (len(steps) - 1) / (MOST_STEPS - 1)) for i in range(MOST_STEPS)}
    shown = [each for i, each in enumerate(steps) if i in spread or len(steps) <= MOST_STEPS]
    takes: dict[tuple, Take] = {}
    for validation in shown:
        for row in validation["videos"]:
            key = (row["prompt"], row["seed"])
            take = takes.setdefault(key, Take(*key, [("Teacher", row["teacher"])]))
            take.videos.append((f"Step {validation['step']}", row["student"]))
    if not takes:
        return ""
    some = "" if len(shown) == len(steps) else f" {len(shown)} of {len(steps)} validations."
    player = gallery([*takes.values()][:MOST_TAKES], shelf, "Videos while training")
    return (
        "<h3>Videos while training</h3><p>The student at several steps beside the teacher, "
        f"{_ORDER}.{some}{_first(takes)}</p>{player}"
    )


def _first(takes: Sized) -> str:
    """Says how many are shown, where not all are."""
    if len(takes) <= MOST_TAKES:
        return ""
    return f" The first {MOST_TAKES} of {len(takes)} pairs of prompt and seed."


def gallery(takes: Sequence[Take], shelf: Shelf, label: str) -> str:
    """Players with one set of controls; without scripts, each player has the browser's own."""
    placed = [
        (take, [(name, path, shelf.place(path)) for name, path in take.videos]) for take in takes
    ]
    clips = [clip for _, players in placed for *_, clip in players if clip]
    tiny = all(clip.width <= TINY_WIDTH for clip in clips)
    figures = "".join(_figure(take, players, tiny) for take, players in placed)
    most = max((len(take.videos) for take in takes), default=1)
    frames = max((clip.frames for clip in clips), default=0)
    fps = max((clip.fps for clip in clips), default=0)
    return (
        f'<div class="gallery{" tiny" if tiny else ""}" style="--most:{most}" tabindex="0" '
        f'role="group" aria-label="{escape(label)}. Space plays or pauses, the arrows left and '
        f'right step a frame." data-frames="{frames}" data-fps="{fps:.6g}">'
        f'{_controls(label, frames)}<div class="takes">{figures}</div></div>'
    )


def _controls(label: str, frames: int) -> str:
    speeds = "".join(
        f'<option value="{value}"{" selected" if value == "1" else ""}>{text}</option>'
        for value, text in _SPEEDS.items()
    )
    return (
        f'<div class="controls" role="group" aria-label="{escape(label)}: playback" hidden>'
        '<button type="button" class="play">Play</button>'
        '<button type="button" class="back" aria-label="One frame back">◂</button>'
        '<button type="button" class="forward" aria-label="One frame forward">▸</button>'
        f'<input type="range" class="scrub" min="0" max="{max(frames - 1, 0)}" step="1" value="0" '
        'aria-label="Frame"><output aria-live="off">1</output>'
        f'<select class="speed" aria-label="Speed">{speeds}</select>'
        '<label><input type="checkbox" class="loop" checked> Loop</label></div>'
    )


def _figure(take: Take, players: Sequence[tuple[str, str, Clip | None]], tiny: bool) -> str:
    prompt = escape(take.prompt)
    videos = "".join(
        f'<div class="player">{_video(path, clip, f"{escape(name)}: {prompt}", tiny)}'
        f"<span>{escape(name)}</span></div>"
        for name, path, clip in players
    )
    return (
        f'<figure class="take" style="--n:{max(len(players), 1)}">'
        f'<div class="frames">{videos}</div>'
        f"<figcaption>{prompt} <span>seed {escape(str(take.seed))}</span></figcaption></figure>"
    )


def _video(path: str, clip: Clip | None, label: str, tiny: bool) -> str:
    """`label` is HTML."""
    if not clip:
        name = escape(path.rpartition("/")[2])
        return f'<div class="missing">{name} is missing or cannot be read.</div>'
    return (
        f'<video width="{clip.width}" height="{clip.height}" controls muted playsinline '
        f'preload="{"auto" if tiny else "metadata"}" aria-label="{label}" '
        f'src="{escape(clip.address)}"></video>'
    )
