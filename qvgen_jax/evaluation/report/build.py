"""The report of a run: a folder of pages and videos that opens from disk, no network needed.

It reads what training, generation, evaluation and export left in the workdir: `metrics.jsonl`
(required), `alarms.jsonl`, `validation.jsonl`, `config.json`, `samples/samples.json`,
`evaluation.json`, `evaluation/videos.json` and `sizes.json`, and the mp4 files that they name. A
section whose input is missing says so; nothing is ever filled in.
"""

from collections.abc import Mapping
from pathlib import Path

from qvgen_jax.evaluation.report.gallery import Shelf, videos_section
from qvgen_jax.evaluation.report.inputs import (
    CONFIG,
    SAMPLES,
    SIZES,
    VIDEOS,
    read_evaluation,
    read_input,
)
from qvgen_jax.evaluation.report.judged import judge_section
from qvgen_jax.evaluation.report.layers import (
    group_layers,
    last_layers,
    layer_page,
    layers_section,
    page_names,
)
from qvgen_jax.evaluation.report.overview import overview
from qvgen_jax.evaluation.report.page import write_page
from qvgen_jax.evaluation.report.records import read_alarms, read_metrics, read_validation
from qvgen_jax.evaluation.report.rerun import rerun_section
from qvgen_jax.evaluation.report.sizes import size_section, time_section
from qvgen_jax.evaluation.report.training import training_section
from qvgen_jax.evaluation.report.validation import validation_section


def write_report(workdir: Path) -> Path:
    """Write `workdir/report` and return the path of its `index.html`.

    Beside the run's own keys, `config.json` may hold `name` (else the workdir's) and `command`.
    Raises UserError when the workdir holds no metrics, or a file in it is not what was written.
    """
    workdir = Path(workdir)
    records = read_metrics(workdir / "metrics.jsonl")
    validations = read_validation(workdir / "validation.jsonl")
    config = read_input(workdir / "config.json", CONFIG) or {}
    evaluation = read_evaluation(workdir / "evaluation.json")
    sizes = read_input(workdir / "sizes.json", SIZES)
    samples = read_input(workdir / "samples" / "samples.json", SAMPLES)
    judged = read_input(workdir / "evaluation" / "videos.json", VIDEOS)
    name = str(config.get("name") or workdir.resolve().name)

    folder = workdir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    shelf = Shelf(workdir, folder)
    layers = last_layers(validations)
    sections = {
        "Videos": videos_section(samples, judged, shelf),
        "What the judge found": judge_section(evaluation),
        "Training": training_section(records, read_alarms(workdir / "alarms.jsonl")),
        "Held-out error": validation_section(validations, records, shelf),
        "Layers": layers_section(layers),
        "Size": size_section(sizes),
        "Time and memory": time_section(evaluation),
        "Do it again": rerun_section(config, evaluation),
    }
    body = overview(name, config, records, evaluation, sizes) + _contents(sections)
    write_page(folder / "index.html", f"{name}: QVGen report", body + _parts(sections))
    _write_layer_pages(folder, name, layers)
    return folder / "index.html"


def _contents(sections: Mapping[str, str]) -> str:
    links = "".join(f'<a href="#{_anchor(title)}">{title}</a>' for title in sections)
    return f'<nav aria-label="Sections">{links}</nav>'


def _parts(sections: Mapping[str, str]) -> str:
    return "\n".join(
        f'<section id="{_anchor(title)}"><h2>{title}</h2>{content}</section>'
        for title, content in sections.items()
    )


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _write_layer_pages(folder: Path, name: str, layers) -> None:
    for old in folder.glob("layers-*.html"):
        old.unlink()
    if not layers:
        return
    step, measured = layers
    groups = group_layers(measured)
    for group, file in page_names([*groups]).items():
        write_page(folder / file, f"{group}: {name}", layer_page(group, step, groups[group]))
