"""The page: Gradio's widgets, queue and files around `Studio.generate`."""

import itertools
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import av
import gradio as gr

from qvgen_jax.data.video import write_video
from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.samples import slug
from qvgen_jax.serve import panels
from qvgen_jax.serve.generate import Progress, Studio, Timing
from qvgen_jax.serve.limits import BOTH, FULL, LOW, Asked

WAITING = 8
"""Requests in the queue; one more is told to come back."""
_KEPT = (600, 3600)  # Every 10 minutes, files older than an hour are deleted.
_SIDES = (FULL, LOW)


def build_page(studio: Studio, folder: Path, title: str) -> gr.Blocks:
    """The page, not yet served.

    Args:
        studio: the models.
        folder: where videos are written until the page has copied them; not Gradio's own, where it
            would take them for its copies.
        title: shown above, such as the model's name.
    """
    own, limits = studio.teacher.defaults, studio.limits
    with gr.Blocks(title=f"qvgen-jax: {title}", delete_cache=_KEPT) as page:
        gr.HTML(
            f"<h1>{escape(title)}</h1><p>One prompt, one noise, two transformers.</p>",
            elem_classes="qv-head",
        )
        if studio.why_alone:
            gr.HTML(panels.note(studio.why_alone))
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                inputs = _inputs(studio)
                with gr.Row():
                    start = gr.Button("Generate", variant="primary", elem_id="generate")
                    stop = gr.Button("Cancel", elem_id="cancel")
                gr.HTML(
                    f"<p>At most {limits.steps} steps, and {limits.positions} latent frames x "
                    f"height x width: the first frame is one of them, then every "
                    f"{limits.temporal}. The model's own are {own['steps']} steps, "
                    f"{own['num_frames']} frames x {own['height']} x {own['width']}.</p>",
                    elem_classes="qv-head",
                )
            with gr.Column(scale=4, min_width=420):
                ready = panels.note("Type a prompt, then Generate.")
                status = gr.HTML(ready, elem_id="status")
                with gr.Row():
                    sides = [_side(name) for name in _SIDES if name == FULL or studio.student]
                times = gr.HTML(elem_id="times")
        outputs = [status, times, *(part for side in sides for part in side)]
        names = _SIDES[: len(sides)]

        def generate(*values: Any) -> Iterator[list]:
            yield from run(studio, folder, names, Asked(*values))

        def cancel() -> list:
            return [panels.note("Cancelled."), "", *(u for name in names for u in _idle(name))]

        running = start.click(
            generate,
            inputs,
            outputs,
            show_progress="minimal",
            show_progress_on=status,
            concurrency_limit=1,
            api_visibility="private",
        )
        # Apart from what it cancels: a last step on its way would be shown after "Cancelled".
        ended = stop.click(None, cancels=running, queue=False, api_visibility="private")
        ended.then(cancel, None, outputs, queue=False, api_visibility="private")
    return page.queue(max_size=WAITING)


def _inputs(studio: Studio) -> list[gr.components.Component]:
    """In the order of `Asked`."""
    own, limits = studio.teacher.defaults, studio.limits
    prompt = gr.Textbox(label="Prompt", lines=3, elem_id="prompt", max_length=limits.characters)
    negative = gr.Textbox(
        label="Negative prompt",
        info="What to avoid; without effect at guidance 1.",
        elem_id="negative",
        max_length=limits.characters,
    )
    choices = [BOTH, FULL, LOW] if studio.student else [FULL]
    sides = gr.Radio(choices, value=choices[0], label="Model", elem_id="sides")
    numbers = {}
    with gr.Row():
        numbers["seed"] = _number("Seed", 0, "seed")
        numbers["steps"] = _number("Steps", own["steps"], "steps")
        numbers["guidance"] = _number("Guidance", own["guidance_scale"], "guidance")
    with gr.Row():
        numbers["frames"] = _number("Frames", own["num_frames"], "frames")
        numbers["height"] = _number("Height", own["height"], "height")
        numbers["width"] = _number("Width", own["width"], "width")
    order = ("seed", "frames", "height", "width", "steps", "guidance")
    return [prompt, negative, *(numbers[name] for name in order), sides]


def _number(label: str, value: float, name: str) -> gr.Number:
    # With a precision Gradio would round what was typed before `check` sees it.
    return gr.Number(value, label=label, elem_id=name, min_width=80)


def _side(name: str) -> tuple[gr.HTML, gr.Video]:
    key = name.replace(" ", "-")
    with gr.Column(min_width=200):
        card = gr.HTML(panels.side(name, idle="Nothing yet."), elem_id=f"card-{key}")
        video = gr.Video(
            label=name,
            show_label=False,
            interactive=False,
            autoplay=True,
            loop=True,
            visible=False,
            buttons=["download"],
            elem_id=f"video-{key}",
        )
    return card, video


def _idle(name: str, text: str = "Nothing yet.") -> list:
    return [panels.side(name, idle=text), gr.update(value=None, visible=False)]


def run(studio: Studio, folder: Path, names: tuple[str, ...], asked: Asked) -> Iterator[list]:
    """Updates of the page's outputs, after every step; errors are told in the first of them.

    Args:
        studio: the models.
        folder: of `build_page`.
        names: of the sides that the page has.
        asked: the request, unchecked.

    Raises:
        Exception: a fault of ours, after the page was told that there is one.
    """
    shown = {name: _idle(name, "Waiting.") for name in names}
    timings: dict[str, Timing] = {}

    def page(status: str) -> list:
        return [status, panels.times(timings) if timings else "", *itertools.chain(*shown.values())]

    def failed(message: str) -> list:
        shown.update((name, _idle(name)) for name in names)
        timings.clear()
        return page(panels.error(message))

    try:
        # Gradio copies the videos as they are shown; then these go.
        with tempfile.TemporaryDirectory(dir=folder) as place:
            for now in studio.generate(asked):
                shown[now.side] = _update(now, asked, Path(place), studio.teacher.defaults["fps"])
                if now.timing:
                    timings[now.side] = now.timing
                yield page(panels.note(f"Generating: {now.side}."))
                if now.timing:
                    shown[now.side][1] = gr.skip()
            for name in set(names) - set(timings):
                shown[name] = _idle(name, "Not asked for.")
            yield page(panels.note("Done."))
    except UserError as error:
        yield failed(str(error))
    except Exception:
        yield failed("failed, see the server's log")
        raise


def _update(now: Progress, asked: Asked, place: Path, fps: float) -> list:
    card = panels.side(now.side, now)
    if now.frames is None:
        return [card, _idle(now.side)[1]]
    label = f"{slug(asked.prompt) or 'video'}-{asked.seed}-{slug(now.side)}.mp4"
    try:
        write_video(place / label, now.frames, fps)
    except (OSError, av.error.FFmpegError) as error:
        raise UserError(
            f"the server cannot write the video ({error.strerror}); make room on its disk"
        ) from error
    return [card, gr.update(value=str(place / label), visible=True)]
