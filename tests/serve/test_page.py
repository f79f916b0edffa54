"""The page in a real browser, on the embedded tiny pipeline: what a person does with it.

Console errors and requests that leave the machine fail it, and so does a connection that the server
opens to another one.
"""

import dataclasses
import re
import socket
import sys
import threading

import pytest

pytest.importorskip("gradio", reason="no Gradio here: pip install -e '.[serve]'")

import qvgen_jax
from qvgen_jax.data.video import read_video
from qvgen_jax.serve.generate import Studio
from qvgen_jax.serve.job import start
from tests.browser import opened_page

pytestmark = pytest.mark.slow
PROMPT = "a red star moving right"
MINUTES = 60_000  # Milliseconds: compiling on a slow core.

connections: set[str] = set()


def _hear(event: str, arguments: tuple) -> None:
    """Adds hosts that this process connects to or asks names for."""
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        connections.add(arguments[1][0])
    if event == "socket.getaddrinfo" and arguments[0]:
        connections.add(str(arguments[0]))


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    sys.addaudithook(_hear)
    teacher = qvgen_jax.load("assets/tiny_wan")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    studio = Studio(teacher, dataclasses.replace(teacher))
    page = start(studio, tmp_path_factory.mktemp("videos"), "tiny", "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)


@pytest.fixture
def page(address):
    with opened_page() as page:
        page.goto(address)
        page.wait_for_selector("#prompt textarea")
        yield page


def fill(page, **fields) -> None:
    small = {"steps": 6, "frames": 5, "height": 32, "width": 32}
    for name, value in (small | fields).items():
        box = page.locator(f"#{name} textarea, #{name} input").first
        box.fill(str(value))
        box.press("Tab")


def ask(page, **fields) -> None:
    fill(page, **fields)
    page.click("#generate")


def test_a_prompt_becomes_two_videos_that_play_and_can_be_kept(page, tmp_path):
    ask(page, prompt=PROMPT, seed=3)
    page.wait_for_selector("#card-full-precision img", timeout=2 * MINUTES)
    page.get_by_text(re.compile("step [1-5] of 6")).first.wait_for(timeout=MINUTES)
    page.get_by_text("Done.").wait_for(timeout=3 * MINUTES)
    assert "median step" in page.inner_text("#times")
    assert "times as long" in page.inner_text("#times")
    for name in ("full-precision", "low-bit"):
        # Decoded by the browser, not merely named: H.264 plays.
        playing = f"document.querySelector('#video-{name} video')?.videoWidth === 32"
        page.wait_for_function(playing, timeout=MINUTES)
        with page.expect_download() as download:
            page.click(f"#video-{name} a[download]")
        assert download.value.suggested_filename == f"a-red-star-moving-right-3-{name}.mp4"
        download.value.save_as(tmp_path / "kept.mp4")
        assert read_video(tmp_path / "kept.mp4").shape == (5, 32, 32, 3)
    assert page.faults == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        (
            {"prompt": PROMPT, "frames": 6},
            "num_frames is 6, expected 1 plus a multiple of 4; use 5",
        ),
        ({"prompt": PROMPT, "steps": 1000}, "steps is 1000, expected a whole number from 1 to 100"),
        ({"prompt": PROMPT, "width": 99999}, "ask for fewer frames or a smaller size"),
    ],
)
def test_wrong_input_gets_one_message_and_the_server_lives_on(page, fields, message):
    ask(page, **fields)
    page.wait_for_selector("#status .qv-error", timeout=MINUTES)
    assert message in page.inner_text("#status")
    assert page.locator("[role=alert]").count() == 1
    assert page.faults == []


def test_a_cancelled_request_makes_way_for_the_next(page):
    ask(page, prompt=PROMPT, steps=100)
    page.get_by_text(re.compile("step [1-9][0-9]* of 100")).first.wait_for(timeout=2 * MINUTES)
    page.click("#cancel")
    page.get_by_text("Cancelled.").wait_for(timeout=MINUTES)
    ask(page, prompt=PROMPT, steps=2)
    page.get_by_text("Done.").wait_for(timeout=2 * MINUTES)
    assert page.faults == []


def test_another_visitor_is_told_to_wait(page, address):
    ask(page, prompt=PROMPT, steps=100)
    page.get_by_text(re.compile("step [1-9][0-9]* of 100")).first.wait_for(timeout=2 * MINUTES)
    other = page.context.browser.new_context().new_page()
    other.goto(address)
    other.wait_for_selector("#prompt textarea")
    ask(other, prompt=PROMPT, steps=2)
    other.get_by_text(re.compile("queue")).first.wait_for(timeout=MINUTES)
    page.click("#cancel")
    other.get_by_text("Done.").wait_for(timeout=2 * MINUTES)


def test_the_server_connects_to_this_machine_alone(address):
    assert threading.active_count() > 1  # It runs; the tests above used it.
    assert connections <= {"127.0.0.1", "localhost", "::1"}
