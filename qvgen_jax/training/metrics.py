"""What a run says while it goes: `metrics.jsonl`, TensorBoard, W&B if asked, and a progress bar.

What is alarming goes to `alarms.jsonl` as well, what a validation finds to `validation.jsonl`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qvgen_jax import hosts
from qvgen_jax.quant.low_rank import small_singular_share
from qvgen_jax.training import validation
from qvgen_jax.training.validation import Validated

_STARVED = 0.1  # Of the time: waiting for data is said beside the bar.


def log_line(metrics: Mapping, params: Mapping, spectrum: bool, speed: Mapping) -> dict:
    """What is written about a step: plain floats, and what the branch's spectrum is if asked."""
    line = {name: float(value) for name, value in metrics.items() if not value.ndim}
    if spectrum:
        line["small_singular_share"] = float(_small_share(params))
    return {**line, **speed}


_small_share = jax.jit(small_singular_share)


def _keep_before(path: Path, step: int) -> None:
    """Drop the lines at or after `step`: the resumed run writes them again, identically."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break  # The process died while writing this line.
        if record["step"] < step:
            kept.append(line + "\n")
    partial = path.with_suffix(".tmp")
    partial.write_text("".join(kept))
    partial.replace(path)


def metric_writer(workdir: Path, start: int, total: int, wandb_project: str, title: str):
    """A `MetricWriter` on the first process of a run, `Silent` on the others."""
    arguments = (workdir, start, total, wandb_project, title)
    return MetricWriter(*arguments) if hosts.is_first() else Silent()


class Silent:
    """Takes what a `MetricWriter` takes, and says nothing."""

    def __enter__(self) -> "Silent":
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is open."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Nothing: the first process writes."""

    def validated(self, step: int, found: Validated) -> None:
        """Nothing: the first process writes."""

    def warn(self, step: int, text: str) -> None:
        """Nothing: the first process does."""

    def advance(self, step: int) -> None:
        """Nothing: the first process has the bar."""


class MetricWriter:
    """Writes scalars by step; a context manager.

    Args:
        workdir: `metrics.jsonl`, `alarms.jsonl`, `validation.jsonl` and `tensorboard/` go there.
        start: the step the run starts from; later lines of an interrupted run are dropped.
        total: steps in all, for the progress bar.
        wandb_project: a W&B project, or "" for none.
        title: what the progress bar is called.
    """

    def __init__(
        self, workdir: Path, start: int, total: int, wandb_project: str = "", title: str = "train"
    ):
        from tensorboardX import SummaryWriter  # Imports PyTorch where there is one: seconds.

        path = workdir / "metrics.jsonl"
        self._workdir, self._alarms = workdir, workdir / "alarms.jsonl"
        for kept in (path, self._alarms, workdir / validation.FILE):
            _keep_before(kept, start)
        validation.drop_videos(workdir, start)
        self._file = path.open("a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start)
        self._wandb = None
        if wandb_project:
            import wandb

            self._wandb = wandb.init(project=wandb_project, dir=str(workdir), resume="allow")
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._task = self._progress.add_task(title, total=total, completed=start, note="")
        self._total = total

    def __enter__(self) -> "MetricWriter":
        self._progress.start()
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Record `scalars` at `step` everywhere, durably in `metrics.jsonl`."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(scalars), step=step)
        shown = {"loss": "{:.3g}", "grad_norm": "{:.2g}", "rank": "{:.0f}", "gate": "{:.2f}"}
        known = {name: form for name, form in shown.items() if name in scalars}
        note = " ".join(f"{name} {form.format(scalars[name])}" for name, form in known.items())
        if "steps_per_second" in scalars:
            note += f" {scalars['steps_per_second']:.2f} steps/s"
        if scalars.get("data_wait", 0) > _STARVED:
            note += f" waits for data {100 * scalars['data_wait']:.0f} %"
        if "mfu" in scalars:
            note += f" MFU {100 * scalars['mfu']:.0f} %"
        self._progress.update(self._task, note=note)
        if not self._progress.console.is_terminal:
            print(f"step {step}/{self._total} {note}", flush=True)

    def validated(self, step: int, found: Validated) -> None:
        """Record what a validation at `step` found, but for its scalars, which `write` takes."""
        with (self._workdir / validation.FILE).open("a") as file:
            file.write(json.dumps({"step": step, **found.record}) + "\n")
        for row in found.record["videos"]:
            self._show(step, row, found.fps)
        line = f"step {step}: {validation.told(found)}"
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _show(self, step: int, row: Mapping, fps: float) -> None:
        """A pair of videos in TensorBoard and W&B."""
        from tensorboardX.proto.summary_pb2 import Summary

        name = f"validation/{row['prompt']}, seed {row['seed']}"
        frames = validation.side_by_side(self._workdir, row)
        width, height = frames[0].size
        # `add_video` would want moviepy, and a second FFmpeg, for the same bytes.
        image = Summary.Image(
            height=height,
            width=width,
            colorspace=3,
            encoded_image_string=validation.as_gif(frames, fps),
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._board.file_writer.add_summary(summary, step)
        if self._wandb is not None:
            import wandb

            files = {side: str(self._workdir / row[side]) for side in ("teacher", "student")}
            shown = {f"{name}/{side}": wandb.Video(file) for side, file in files.items()}
            self._wandb.log(shown, step=step)

    def warn(self, step: int, text: str) -> None:
        """Say something of a step beside the bar, and keep it in `alarms.jsonl` for the report."""
        self._progress.console.print(f"warning: step {step}: {text}", highlight=False, markup=False)
        with self._alarms.open("a") as file:
            file.write(json.dumps({"step": step, "alarm": text}) + "\n")

    def advance(self, step: int) -> None:
        """Move the bar to `step` updates done."""
        self._progress.update(self._task, completed=step)
