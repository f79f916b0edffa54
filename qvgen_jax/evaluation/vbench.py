"""Videos in the tree that VBench's scorers read, and its scores beside the paper's.

VBench (arXiv 2311.17982) takes a flat folder of `{prompt}-{0..4}.mp4` and nothing else. The paper
scores eight of its dimensions, on 251 prompts in three folders. VBench-2.0 (arXiv 2503.21755) has a
folder of `{first 180 characters of the prompt}-{i}.mp4` for each of 18 dimensions. The prompts come
from the installed package's list; its scorers download weights and pin old libraries, so that they
run in an environment of their own, see docs/vbench.md.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from qvgen_jax.data.video import write_video
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.asked import seed_of
from qvgen_jax.evaluation.evaluate import made_by
from qvgen_jax.json_file import read_json, read_object, write_json
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.request import prompt_fault

PAPER = (
    "imaging_quality",
    "aesthetic_quality",
    "motion_smoothness",
    "dynamic_degree",
    "background_consistency",
    "subject_consistency",
    "scene",
    "overall_consistency",
)
"""The dimensions that the paper scores, in its order."""

PAPER_ROWS = {
    "bf16": (59.15, 54.49, 97.43, 67.78, 94.79, 92.82, 36.24, 25.06),
    "QVGen W4A4": (60.16, 54.61, 98.06, 67.22, 94.38, 93.01, 31.42, 24.61),
    "Q-DM W4A4": (54.96, 52.71, 98.00, 48.61, 93.82, 91.86, 28.02, 23.87),
    "EfficientDM W4A4": (55.96, 51.97, 98.03, 46.67, 94.10, 91.70, 27.76, 24.28),
    "LSQ W4A4": (58.73, 54.20, 97.57, 45.00, 92.97, 92.41, 24.06, 23.17),
}
"""CogVideoX-2B, percent (QVGen, arXiv 2505.11497)."""

MANIFEST = "manifest.json"
_SMOKE = 2  # Prompts of each folder, and videos of each.
# The dimension that a folder of prompts is called after, where it serves several.
_FILES = ("overall_consistency", "subject_consistency", "scene")
_LONGEST = 255  # Bytes of a file's name.


class Suite(NamedTuple):
    """Which benchmark, by its package.

    Attributes:
        package: its name; of the tree too.
        scorer: the package's class.
        info: the file beside it that lists the prompts.
        cut: how many characters of a prompt are in a file's name; None for all.
        videos: of each prompt.
        more: dimensions that want another number.
    """

    package: str
    scorer: str
    info: str
    cut: int | None
    videos: int
    more: Mapping[str, int]

    def count(self, dimension: str) -> int:
        """Videos of each prompt of a dimension."""
        return self.more.get(dimension, self.videos)


VBENCH = Suite("vbench", "VBench", "VBench_full_info.json", None, 5, {})
VBENCH_2 = Suite("vbench2", "VBench2", "VBench2_full_info.json", 180, 3, {"Diversity": 20})


class Row(NamedTuple):
    """One video that is wanted.

    Attributes:
        folder: below the tree's root, by what is scored on it.
        file: below the tree's root, in the folder.
        prompt: as the package has it.
        index: of the videos of one prompt, from 0 on.
        seed: of its noise, a function of prompt, index and the tree's seed alone.
        dimensions: scored on it.
    """

    folder: str
    file: str
    prompt: str
    index: int
    seed: int
    dimensions: tuple[str, ...]


def read_prompts(info: Path, suite: Suite = VBENCH) -> list[tuple[str, tuple[str, ...]]]:
    """Prompts and the dimensions that are scored on each, in the package's order.

    Args:
        info: the installed package's list of prompts.
        suite: whose.

    Raises:
        UserError: it is missing or something else.
    """
    remedy = f"give the {suite.info} of the installed {suite.package} package"
    found = read_json(info, remedy)
    rows = found if isinstance(found, list) else [None]
    for row in rows:
        prompt = row.get("prompt_en") if isinstance(row, dict) else None
        dimensions = row.get("dimension") if isinstance(row, dict) else None
        good = isinstance(prompt, str) and not prompt_fault(prompt) and isinstance(dimensions, list)
        named = good and all(isinstance(n, str) and re.fullmatch(r"[\w-]+", n) for n in dimensions)
        if not named or not dimensions:
            raise UserError(f"{info} holds no list of prompt_en and dimension; {remedy}")
        name = f"{prompt[: suite.cut]}-{max(map(suite.count, dimensions)) - 1}.mp4"
        if "/" in name or not name.isprintable() or len(name.encode()) > _LONGEST:
            raise UserError(f"{info}: the prompt {prompt[:80]!r} cannot be a file's name; {remedy}")
    return [(row["prompt_en"], tuple(row["dimension"])) for row in rows]


def rows_of(
    prompts: Sequence[tuple[str, tuple[str, ...]]],
    dimensions: Sequence[str],
    seed: int = 0,
    smoke: bool = False,
    suite: Suite = VBENCH,
) -> list[Row]:
    """The videos that some dimensions want, each once: VBench-2.0 lists one of its prompts twice.

    Args:
        prompts: of `read_prompts`.
        dimensions: to be scored.
        seed: of the whole tree.
        smoke: whether two prompts of each folder are enough, with two videos each.
        suite: what names and counts them.

    Raises:
        UserError: a dimension that no prompt is for, or two prompts that one file is named after.
    """
    known = {name for _, names in prompts for name in names}
    if unknown := sorted(set(dimensions) - known):
        there = ", ".join(sorted(known))
        raise UserError(f"{suite.scorer} has no dimension {', '.join(unknown)}; there are {there}")
    named: dict[str, str] = {}
    found, counts = [], {}
    for prompt, names in prompts:
        asked = tuple(name for name in names if name in dimensions)
        folder = next((name for name in _FILES if name in names), names[0])
        stem = f"{folder}/{prompt[: suite.cut]}"
        if not asked or named.get(stem) == prompt:
            continue
        if stem in named:
            raise UserError(
                f"two prompts are named {stem!r}: a tree cannot hold the videos of both"
            )
        named[stem] = prompt
        counts[folder] = counts.get(folder, 0) + 1
        if smoke and counts[folder] > _SMOKE:
            continue
        for i in range(_SMOKE if smoke else suite.count(names[0])):
            file, noise = f"{stem}-{i}.mp4", seed_of(prompt, i, seed)
            found.append(Row(folder, file, prompt, i, noise, asked))
    return found


def write_tree(
    pipe: Pipeline,
    out: Path,
    rows: Sequence[Row],
    *,
    name: str,
    batch_size: int,
    part: tuple[int, int] = (0, 1),
) -> Path:
    """Writes the videos that are not there yet, below `out/videos`, and `out/manifest.json`.

    Args:
        pipe: makes them with its own settings.
        out: of one variant.
        rows: all that belong there.
        name: of the variant.
        batch_size: videos at once.
        part: (i, n): only every n-th row from the i-th on, for n machines at work on one disk.

    Returns:
        `out`.

    Raises:
        UserError: `out` holds the videos of another model, or with other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    _claim(out / MANIFEST, name, pipe, rows)
    mine = [row for row in rows[part[0] :: part[1]] if not (out / "videos" / row.file).is_file()]
    partial = out / f"partial-{part[0]}.mp4"  # A folder of videos holds nothing else.
    for start in range(0, len(mine), batch_size):
        batch = mine[start : start + batch_size]
        videos = pipe.generate(
            [row.prompt for row in batch],
            seeds=[row.seed for row in batch],
            batch_size=min(batch_size, len(mine)),
        )
        for row, video in zip(batch, videos, strict=True):
            path = out / "videos" / row.file
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(partial, video, pipe.defaults["fps"])
            partial.replace(path)
        print(f"{name}: {start + len(batch)} of {len(mine)} videos", flush=True)
    return out


def _claim(path: Path, name: str, pipe: Pipeline, rows: Sequence[Row]) -> None:
    """Writes the manifest, or sees that the one there is the same."""
    manifest: dict[str, Any] = {
        "name": name,
        "made_by": made_by(pipe),
        "settings": {key: pipe.defaults[key] for key in sorted(pipe.defaults)},
        "videos": [
            {"file": row.file, "prompt": row.prompt, "index": row.index, "seed": row.seed}
            | {"dimensions": list(row.dimensions)}
            for row in rows
        ],
    }
    if path.is_file():
        before = read_object(path, f"delete {path.parent}")
        if differs := [key for key, value in manifest.items() if before.get(key) != value]:
            raise UserError(
                f"{path.parent} holds videos of other {', '.join(differs)}: delete that folder, or "
                "give another --workdir"
            )
        return
    write_json(path, manifest)


def read_scores(folder: Path) -> dict[str, float]:
    """Percent by dimension, from the `*_eval_results.json` files that VBench wrote to a folder.

    Raises:
        UserError: a file is something else.
    """
    scores: dict[str, float] = {}
    for path in sorted(folder.glob("*_eval_results.json")):
        remedy = "score again, or delete it"
        for name, value in read_object(path, remedy).items():
            # [the score, one row per video]
            score = value[0] if isinstance(value, list) and value else value
            if isinstance(score, bool) or not isinstance(score, int | float):
                raise UserError(f"{path} has no score of {name}; {remedy}")
            scores[name] = 100 * float(score)
    return scores


def table(
    scores: Mapping[str, Mapping[str, float]], dimensions: Sequence[str] | None = None
) -> str:
    """Markdown: scores by variant in some dimensions; in the paper's beside the paper's own rows.

    Args:
        scores: variant -> dimension -> percent.
        dimensions: a column each; None for the paper's.
    """
    columns = dimensions or PAPER
    heads = [name.replace("_", " ") for name in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, found in scores.items():
        cells = [f"{found[key]:.2f}" if key in found else "not scored" for key in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for name, row in ({} if dimensions else PAPER_ROWS).items():
        cells = " | ".join(f"{value:.2f}" for value in row)
        lines.append(f"| the paper, CogVideoX-2B {name} | {cells} |")
    return "\n".join(lines)
