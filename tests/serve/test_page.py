"""The page in a real browser, on the embedded tiny pipeline: what a person does with it.

Console errors and requests that leave the machine fail it, and so does a connection to another one
that the server opens through Python's sockets; what uvloop opens by itself raises no audit event.
"""

import dataclasses
import errno
import os
import re
import socket
import sys

import pytest

pytest.importorskip("gradio", reason="no Gradio here: pip install -e '.[serve]'")

import qvgen_jax
from qvgen_jax.data.video import read_video
from qvgen_jax.errors import UserError
from qvgen_jax.serve.generate import Studio
from qvgen_jax.serve.job import start
from qvgen_jax.serve.limits import FULL, Asked
from qvgen_jax.serve.page import run
from tests.browser import new_page, opened_browser

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
def studio():
    teacher = qvgen_jax.load("assets/tiny_wan")
    return Studio(teacher, dataclasses.replace(teacher))


@pytest.fixture(scope="module")
def address(studio, tmp_path_factory):
    sys.addaudithook(_hear)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    page = start(studio, tmp_path_factory.mktemp("videos"), "tiny", "127.0.0.1", port)
    yield f"http://127.0.0.1:{port}"
    page.close(verbose=False)
    assert connections, "its start asks itself whether it runs"
    assert connections <= {"127.0.0.1", "localhost", "::1"}


def visit(browser, address):
    page = new_page(browser)
    page.goto(address)
    page.wait_for_selector("#prompt textarea")
    return page


@pytest.fixture
def page(address):
    with opened_browser() as browser:
        yield visit(browser, address)


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
    ask(page, prompt=PROMPT, seed=3, steps=60)  # So many that the previews stand for seconds.
    page.wait_for_selector("#card-full-precision img", timeout=2 * MINUTES)
    page.get_by_text(re.compile("step [1-9][0-9]? of 60")).first.wait_for(timeout=MINUTES)
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
        ({"prompt": PROMPT, "steps": 2.5}, "steps is 2.5, expected a whole number"),
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
    page.wait_for_timeout(1000)
    assert page.inner_text("#status") == "Cancelled.", "no last step comes after it"
    ask(page, prompt=PROMPT, steps=2)
    page.get_by_text("Done.").wait_for(timeout=2 * MINUTES)
    assert page.faults == []


def test_another_visitor_is_told_to_wait(page, address):
    ask(page, prompt=PROMPT, steps=100)
    page.get_by_text(re.compile("step [1-9][0-9]* of 100")).first.wait_for(timeout=2 * MINUTES)
    other = visit(page.context.browser, address)
    ask(other, prompt=PROMPT, steps=2)
    other.get_by_text(re.compile("queue")).first.wait_for(timeout=MINUTES)
    page.click("#cancel")
    other.get_by_text("Done.").wait_for(timeout=2 * MINUTES)
    assert page.faults == other.faults == []


def test_an_address_that_is_taken_meanwhile_is_told(studio, address, tmp_path):
    port = int(address.rpartition(":")[2])
    with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}"):
        start(studio, tmp_path, "tiny", "127.0.0.1", port)


SMALL = Asked(PROMPT, "", 3, 5, 32, 32, 2, 1.0)


def test_a_video_that_cannot_be_written_is_told(studio, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("qvgen_jax.serve.page.write_video", full)
    *_, last = run(studio, tmp_path, (FULL,), SMALL)
    assert "cannot write the video (No space left on device); make room" in last[0]
    assert list(tmp_path.iterdir()) == []


def test_a_fault_is_told_on_the_page_and_in_the_log(studio, tmp_path):
    updates = run(studio, tmp_path / "gone", (FULL,), SMALL)
    assert "failed, see the server&#x27;s log" in next(updates)[0]
    with pytest.raises(FileNotFoundError):
        next(updates)
