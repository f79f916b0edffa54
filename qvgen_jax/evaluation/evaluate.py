"""The verdict on students: the same prompts and noise through every variant, compared in pairs."""

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from qvgen_jax import hosts
from qvgen_jax.components import fingerprint
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation import answers
from qvgen_jax.evaluation.answers import Place
from qvgen_jax.evaluation.asked import HELD_OUT, Asked, in_slices, questions
from qvgen_jax.evaluation.reference import reference_folder
from qvgen_jax.evaluation.rows import row
from qvgen_jax.evaluation.samples import slug
from qvgen_jax.evaluation.table import table
from qvgen_jax.json_file import write_json, write_whole
from qvgen_jax.pipeline import Pipeline

REFERENCE = "Full precision"
RESULT = "evaluation.json"
_HOURS = 24  # That processes of one run may need longer than others for their share.
_SAME = ("num_frames", "height", "width")  # Settings without which videos are not pairs.


class Variant(NamedTuple):
    """One line of the table.

    Attributes:
        load: gives its pipeline; called again where it was let go meanwhile.
        packed: its weights are few bits. Those are computed first: a device tells the most bytes
            that any variant of the process has used so far, and these should use least.
    """

    load: Callable[[], Pipeline]
    packed: bool = False


class _Known(NamedTuple):
    """What stays of a variant's pipeline when it is let go."""

    config: Any
    others: str  # Of autoencoder and text encoder.
    settings: Mapping[str, Any]
    made_by: str
    weights_bytes: int


def made_by(pipe: Pipeline) -> str:
    """A digest of everything but prompt and seed that decides a pipeline's videos."""
    networks = fingerprint(pipe.transformer, pipe.vae, pipe.text_encoder)
    settings = f"{networks} {pipe.scheduler} {sorted(pipe.defaults.items())}"
    return hashlib.sha256(settings.encode()).hexdigest()[:12]


def evaluate_variants(
    config: Mapping, workdir: Path, variants: Mapping[str, Variant], part: tuple[int, int] = (0, 1)
) -> dict | None:
    """Let all variants answer and compare them; the first must be the full-precision one.

    That one's answers are kept in `evaluate.reference`, which runs may share. What was answered
    before is not computed again. Writes `evaluation.json`, `evaluation.md` and
    `evaluation/videos.json` with its videos in the workdir.

    Args:
        config: reads `evaluate` and `sample`.
        workdir: of the run, or of this comparison.
        variants: by their names in the table, in its order.
        part: (i, n): this process answers every n-th slice from the i-th on.

    Returns:
        What `evaluation.json` holds; None while slices of other parts are missing.

    Raises:
        UserError: a variant is of another model, told before anything is computed; or a file of
            prompts is missing.
    """
    asked = questions(config)
    size = min(config["sample"]["batch_size"], len(asked))
    slices = in_slices(asked, size)
    mine = {name: slices[name] for name in list(slices)[part[0] :: part[1]]}
    known = {name: _known(variant.load()) for name, variant in variants.items()}
    first = next(iter(variants))
    for name in variants:
        _check_base(name, known[name], known[first])
    places = _places(config, workdir, known)
    for name in sorted(variants, key=lambda name: not variants[name].packed):
        answers.answer(variants[name].load, places[name].answers, mine, size)
    shown, pixels = config["evaluate"]["shown"], config["evaluate"]["pixels"]
    answers.compare(variants[first].load, list(places.values()), mine, size, shown, pixels)
    hosts.barrier("slices evaluated", 60 * _HOURS)
    if not all(place.is_complete(name) for place in places.values() for name in slices):
        return None
    result = _result(config, asked, slices, known, places)
    if hosts.is_first():
        gallery = _gallery(workdir, asked[:shown], places)
        write_json(workdir / "evaluation" / "videos.json", gallery)
        write_json(workdir / RESULT, result)
        write_whole(workdir / "evaluation.md", table(result) + "\n")
    return result


def _gallery(workdir: Path, asked: list[Asked], places: Mapping[str, Place]) -> list[dict]:
    """What `evaluation/videos.json` holds: the first few videos of every variant."""
    return [
        {
            "prompt": each.prompt,
            "seed": each.seed,
            "videos": {
                name: place.video(number).relative_to(workdir).as_posix()
                for name, place in places.items()
            },
        }
        for number, each in enumerate(asked)
    ]


def _known(pipe: Pipeline) -> _Known:
    return _Known(
        pipe.transformer.config,
        fingerprint(pipe.vae, pipe.text_encoder),
        {key: pipe.defaults[key] for key in (*_SAME, "steps", "guidance_scale")},
        made_by(pipe),
        sum(leaf.nbytes for leaf in jax.tree.leaves(pipe.transformer.states)),
    )


def _check_base(name: str, ours: _Known, theirs: _Known) -> None:
    """Refuse a variant of another model; retrained weights of the same transformer pass."""
    remedy = "compare exports of one model, and name that one as config.model"
    if ours.config != theirs.config:
        pairs = [dataclasses.asdict(each) for each in (ours.config, theirs.config)]
        differs = [
            f"{key} {pairs[0].get(key)!r} where full precision has {value!r}"
            for key, value in pairs[1].items()
            if pairs[0].get(key) != value
        ]
        raise UserError(f"{name} is another transformer: {', '.join(differs[:3])}; {remedy}")
    if ours.others != theirs.others:
        raise UserError(
            f"{name} was made from another pipeline: its autoencoder or text encoder is not full "
            f"precision's; {remedy}"
        )
    for key in _SAME:
        if ours.settings[key] != theirs.settings[key]:
            raise UserError(
                f"{name} makes videos of {key} {ours.settings[key]}, full precision of "
                f"{theirs.settings[key]}; make its generation_config.json the same"
            )


def _places(config: Mapping, workdir: Path, known: Mapping[str, _Known]) -> dict[str, Place]:
    """Where each variant's files are; another model, or other settings, must not find them."""
    places, home, pixels = {}, workdir / "evaluation", config["evaluate"]["pixels"]
    reference = next(iter(known.values())).made_by
    for name, each in known.items():
        folder = "-".join(filter(None, [slug(name), each.made_by]))
        if places:
            against = f"{folder}-against-{reference}" + "-latents" * (not pixels)
            place = Place(home / folder, home / against, home / "videos")
        else:
            place = Place(reference_folder(config, workdir) / folder, None, home / "videos")
        places[name] = place
    return places


def _result(
    config: Mapping,
    asked: list[Asked],
    slices: answers.Slices,
    known: Mapping[str, _Known],
    places: Mapping[str, Place],
) -> dict:
    first, *others = known
    reference = answers.read(places[first].answers, slices, leave="latents")
    rows = [row(first, reference, None, reference, known[first].weights_bytes)]
    for name in others:
        found = answers.read(places[name].answers, slices, leave="latents")
        distance = answers.read(places[name].distances, slices)
        rows.append(row(name, found, distance, reference, known[name].weights_bytes))
    counted = config["sample"]["prompts"] == HELD_OUT
    prompts = "held out: (shape, colour, direction) triples that training never saw"
    warm, size = reference["warm"].any(), len(next(iter(slices.values())))
    return {
        "videos": len(asked),
        "prompts": prompts if counted else f"from {config['sample']['prompts']}",
        **({"seed": config["evaluate"]["seed"]} if counted else {}),
        "steps": known[first].settings["steps"],
        "guidance_scale": known[first].settings["guidance_scale"],
        "variants": rows,
        "timing": (
            f"Median over full batches of {size} after each process's first, which compiles."
            if warm
            else "Compilation is included: there are too few videos to leave it out."
        ),
        "device": f"{jax.devices()[0].device_kind} x {jax.device_count()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
