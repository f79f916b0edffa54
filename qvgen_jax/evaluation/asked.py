"""What every variant is asked: prompts with their seeds, in slices that machines share.

A video is a function of its prompt and its seed, and a seed of what is asked alone: the same on any
machine, with any number of processes and devices, whoever computes it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from qvgen_jax.data.moving_shapes import Attributes, caption, held_out_prompts
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.samples import read_prompts

HELD_OUT = "held_out"
"""The value of `sample.prompts` that stands for the tiny pipeline's world."""


class Asked(NamedTuple):
    """One video that every variant makes.

    Attributes:
        prompt: its text.
        seed: of its noise.
        wanted: what the judge shall find; None where the prompt is not of the tiny world.
    """

    prompt: str
    seed: int
    wanted: Attributes | None = None


def seed_of(prompt: str, index: int, seed: int = 0) -> int:
    """31 bits that depend on prompt, index and seed, on no machine and no number of devices."""
    digest = hashlib.sha256(f"{seed} {index} {prompt}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def held_out(videos: int, seed: int) -> list[Asked]:
    """Held-out descriptions, cycled; seeds count up, as in every figure that was published."""
    prompts = held_out_prompts()
    wanted = [prompts[index % len(prompts)] for index in range(videos)]
    return [Asked(caption(each), seed + index, each) for index, each in enumerate(wanted)]


def questions(config: Mapping) -> list[Asked]:
    """The `evaluate.videos` videos of a config, of its `sample.prompts`, which are cycled.

    The i-th time that a prompt of a file comes, its seed is `seed_of(prompt, i, evaluate.seed)`:
    lines that are added or moved change no other prompt's videos.

    Raises:
        UserError: the file of prompts is missing or holds none.
    """
    videos, seed = config["evaluate"]["videos"], config["evaluate"]["seed"]
    source = config["sample"]["prompts"]
    if source == HELD_OUT:
        return held_out(videos, seed)
    prompts, times = read_prompts(source, videos), Counter()
    asked = []
    for index in range(videos):
        prompt = prompts[index % len(prompts)]
        asked.append(Asked(prompt, seed_of(prompt, times[prompt], seed)))
        times[prompt] += 1
    return asked


def in_slices(asked: Sequence[Asked], size: int) -> dict[str, tuple[Asked, ...]]:
    """`size` videos each, by a name that says where they begin and changes with what is asked."""
    found = {}
    for start in range(0, len(asked), size):
        part = tuple(asked[start : start + size])
        text = "\n".join(f"{each.seed} {each.prompt}" for each in part)
        found[f"{start:05d}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"] = part
    return found


def parse_part(text: str) -> tuple[int, int]:
    """`0/4` as (0, 4).

    Raises:
        UserError: it is something else.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--part={text}; expected i/n, such as 0/4 for the first of four machines")
    return int(found[1]), int(found[2])
