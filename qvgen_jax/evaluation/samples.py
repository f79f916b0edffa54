"""Videos to look at: the pairs of a run's report, and what `--job generate` writes."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jax.sharding import Mesh

from qvgen_jax import storage
from qvgen_jax.data.moving_shapes import caption, held_out_prompts
from qvgen_jax.data.video import write_video
from qvgen_jax.errors import UserError
from qvgen_jax.mesh import mesh_to_generate
from qvgen_jax.pipeline import Pipeline, load
from qvgen_jax.request import prompt_list


def read_prompts(source: str, count: int) -> list[str]:
    """The first `count` prompts: "held_out" of the tiny pipeline's world, or a text file's lines.

    Raises:
        UserError: the file is missing, is no text, or has no lines.
    """
    if source == "held_out":
        return [caption(attributes) for attributes in held_out_prompts()[:count]]
    remedy = "a text file with one prompt per line, or 'held_out' for the tiny pipeline"
    return read_lines(source, count, "sample.prompts", remedy)


def read_lines(source: str, count: int, key: str, remedy: str) -> list[str]:
    """The first `count` prompts of a text file, one a line.

    Args:
        source: the file.
        count: at most so many.
        key: of the config, that names it.
        remedy: what to give instead of one that is missing.

    Raises:
        UserError: the file is missing, is no text, or has no lines.
    """
    path = Path(source)
    if not path.is_file():
        raise UserError(f"{key}={source!r} is no file; give {remedy}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} does not read as UTF-8 text ({error}); save it as such") from error
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [prompt for prompt in prompts if prompt][:count]
    if not prompts:
        raise UserError(f"{path} holds no prompts; write one per line")
    return prompt_list(prompts, str(path))


def write_pairs(config: Mapping, workdir: Path, teacher: Pipeline, student: Pipeline) -> None:
    """Same prompts, same noise, teacher and student: mp4 files and `samples/samples.json`."""
    sample = config["sample"]
    folder = workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    prompts = read_prompts(sample["prompts"], sample["count"])
    seeds = [sample["seed"] + index for index in range(len(prompts))]
    videos = {
        name: pipe.generate(prompts, seeds=seeds, batch_size=sample["batch_size"])
        for name, pipe in (("teacher", teacher), ("student", student))
    }
    rows = []
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        row = {"prompt": prompt, "seed": seed}
        for name, clips in videos.items():
            row[name] = f"{name}_{index:03d}.mp4"
            write_video(folder / row[name], clips[index], teacher.defaults["fps"])
        rows.append(row)
    (folder / "samples.json").write_text(json.dumps(rows, indent=1))


def load_to_generate(
    config: Mapping, folder: str | Path, dtype: str | None = None, mesh: Mesh | None = None
) -> Pipeline:
    """A pipeline that only makes videos; its text encoder is on the devices only while it encodes.

    Args:
        config: reads `text_weights` and `kernels`.
        folder, dtype, mesh: see `qvgen_jax.load`.
    """
    how = {"text_weights": config["text_weights"], "kernels": config["kernels"]}
    return load(folder, dtype, mesh, free_text_encoder=True, **how)


def slug(text: str) -> str:
    """At most 60 letters, digits and dashes of a text, for names of files; may be empty."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60]


def generate_files(config: Mapping, workdir: Path, prompts: Sequence[str], seed: int) -> list[Path]:
    """Write one mp4 per prompt to `workdir/generated`.

    They come from the run's export; from the config's model where there was no run yet.

    Raises:
        UserError: no prompts, or a run that has not ended.
    """
    if not prompts:
        raise UserError('--job generate needs --prompt "..."; it may be repeated')
    prompt_list(prompts, "--prompt")
    export = workdir / "export"
    source = export if (export / "model_index.json").is_file() else config["model"]
    if source != export and storage.checkpoints(workdir).is_dir():
        raise UserError(
            f"{workdir} holds a run without an export: let it end (--job train), pack it "
            "(--job export), or give an empty --workdir to generate with the full-precision model"
        )
    print(f"generating with {source}", flush=True)
    pipe = load_to_generate(config, source, mesh=mesh_to_generate())
    folder = workdir / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for prompt in prompts:
        # The digest tells apart prompts that the slug does not: long ones, other scripts.
        digest = hashlib.sha256(prompt.encode()).hexdigest()[:8]
        path = folder / "-".join(filter(None, [slug(prompt), digest, f"{seed}.mp4"]))
        write_video(path, pipe.generate(prompt, seeds=seed)[0], pipe.defaults["fps"])
        paths.append(path)
    return paths
