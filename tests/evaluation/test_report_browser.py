"""The report in a browser, from disk: it plays, sorts and fits, and asks nobody for anything.

Needs a Chromium that plays H.264, as Debian's does.
"""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import pytest

from qvgen_jax.evaluation.report import write_report
from tests.browser import browser_path, new_page, opened_browser
from tests.evaluation.full_workdir import FPS, FRAMES, VARIANTS, add_everything
from tests.evaluation.test_report import make_workdir

pytestmark = pytest.mark.slow

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 900}
TIMES = """gallery => [...gallery.querySelectorAll("video")]
    .filter(video => video.getBoundingClientRect().top < innerHeight)
    .map(video => video.currentTime)"""
# Of every frame that the browser draws in three seconds: times of the videos, and those that play.
WATCH = """gallery => new Promise(resolve => {
    const videos = [...gallery.querySelectorAll("video")], seen = [], begin = performance.now();
    const look = () => {
        seen.push(videos.map(video => [video.currentTime, video.paused || video.seeking]));
        performance.now() - begin < 3000 ? requestAnimationFrame(look) : resolve(seen);
    };
    look();
})"""


@pytest.fixture(scope="module")
def browser():
    with opened_browser() as started:
        yield started


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(add_everything(make_workdir(tmp_path_factory.mktemp("run"))))


@pytest.fixture
def visit(browser, report):
    """Opens a page of the report; what any of them says or asks for is looked at in the end."""
    pages = []

    def opened(name="index.html", viewport=DESK, **settings):
        settings = {"reduced_motion": "reduce"} | settings
        pages.append(new_page(browser, viewport=viewport, **settings))
        pages[-1].goto((report.parent / name).as_uri())
        return pages[-1]

    yield opened
    inside = report.parent.as_uri() + "/"
    for page in pages:
        page.context.close()
        assert page.faults == []
        assert all(url.startswith((inside, "data:")) for url in page.asked), page.asked


def test_a_browser_that_is_named_must_exist(monkeypatch):
    monkeypatch.setenv("QVGEN_BROWSER", "/no/such/browser")
    with pytest.raises(pytest.fail.Exception, match="'/no/such/browser', and there is no such"):
        browser_path()


def shown_frames(gallery):
    """The frames that the videos in view stand at, once they are there."""
    settled = "video => video.getBoundingClientRect().top > innerHeight || !video.seeking"
    gallery.evaluate(
        "async (gallery) => { const videos = [...gallery.querySelectorAll('video')];"
        f"while (!videos.every({settled})) await new Promise(requestAnimationFrame); }}"
    )
    return {int(time * FPS) for time in gallery.evaluate(TIMES)}


def first_gallery(page):
    gallery = page.locator(".gallery").first
    gallery.scroll_into_view_if_needed()
    page.wait_for_function(
        "() => document.querySelector('.gallery video').readyState >= 2", timeout=10_000
    )
    return gallery


def test_videos_play_within_a_frame_of_each_other_and_begin_again(visit):
    gallery = first_gallery(visit())
    gallery.get_by_role("button", name="Play").click()
    first = gallery.locator("figure").first
    seen = first.evaluate(WATCH)
    assert gallery.get_by_role("button", name="Pause").count() == 1
    apart = [max(t for t, _ in row) - min(t for t, _ in row) for row in seen]
    assert max(apart) <= 1 / FPS
    leading = [row[0][0] for row in seen]
    assert max(leading) > (FRAMES - 1) / FPS, "the last frame is shown"
    assert any(after < before for before, after in pairwise(leading))
    assert sum(not still for row in seen for _, still in row) > len(seen), "most of the time"


def test_videos_play_by_themselves_unless_motion_is_unwanted(visit):
    gallery = first_gallery(visit(reduced_motion="no-preference"))
    gallery.get_by_role("button", name="Pause").click()
    (frame,) = shown_frames(gallery)
    assert gallery.locator("output").inner_text() == f"{frame + 1} / {FRAMES}"


def test_the_gallery_waits_for_a_press_where_motion_is_unwanted(visit):
    gallery = first_gallery(visit())
    assert gallery.get_by_role("button", name="Play").count() == 1
    assert shown_frames(gallery) == {0}


def test_without_a_loop_videos_stop_at_the_last_frame(visit):
    gallery = first_gallery(visit())
    gallery.get_by_label("Loop").uncheck()
    gallery.get_by_label("Speed").select_option("2")
    gallery.get_by_role("button", name="Play").click()
    gallery.get_by_role("button", name="Play").wait_for(timeout=10_000)
    assert shown_frames(gallery) == {FRAMES - 1}


def test_without_scripts_every_player_has_the_browsers_controls(visit):
    page = visit(java_script_enabled=False)
    assert page.locator("video").count() == page.locator("video[controls]").count() == 14
    assert not page.locator(".controls").first.is_visible()


def test_the_slider_moves_all_videos(visit):
    gallery = first_gallery(visit())
    gallery.get_by_label("Frame", exact=True).fill("9")
    assert shown_frames(gallery) == {9}
    gallery.get_by_label("Frame", exact=True).press("End")
    assert shown_frames(gallery) == {FRAMES - 1}
    assert gallery.locator("output").inner_text() == f"{FRAMES} / {FRAMES}"


def test_buttons_and_arrows_step_one_frame_and_space_plays(visit):
    gallery = first_gallery(visit())
    for _ in range(3):
        gallery.get_by_label("One frame forward").click()
    gallery.get_by_label("One frame back").click()
    assert shown_frames(gallery) == {2}
    gallery.focus()
    gallery.press("ArrowRight")
    assert shown_frames(gallery) == {3}
    gallery.press("ArrowLeft")
    gallery.press("ArrowLeft")
    assert shown_frames(gallery) == {1}
    assert gallery.evaluate("element => getComputedStyle(element).outlineStyle") == "solid"
    gallery.press(" ")
    assert gallery.get_by_role("button", name="Pause").count() == 1


def test_tables_sort_by_click_and_by_keyboard_and_say_so(visit):
    page = visit()
    table = page.get_by_role("table", name="How near to full precision")
    names = table.locator("tbody th")
    head = table.get_by_role("columnheader", name="PSNR")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert names.all_inner_texts() == [VARIANTS[1], VARIANTS[2], VARIANTS[0]], "unknown ones last"
    head.get_by_role("button").press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert names.all_inner_texts() == [VARIANTS[2], VARIANTS[1], VARIANTS[0]]
    table.get_by_role("columnheader", name="Model").get_by_role("button").press("Space")
    assert names.all_inner_texts() == sorted(VARIANTS)
    assert head.get_attribute("aria-sort") == "none"


def test_a_group_of_layers_has_a_page_of_its_own(visit):
    page = visit()
    page.get_by_role("link", name="ffn").click()
    page.wait_for_url("**/layers-ffn.html")
    assert page.get_by_role("heading", level=1).inner_text().startswith("ffn")
    assert page.get_by_role("row").count() == 1 + 8
    assert page.locator("svg.curve").count() == 3
    page.get_by_role("button", name="Weight error").click()
    assert page.get_by_role("rowheader").first.inner_text() == "blocks.0.ffn.up"
    page.get_by_role("link", name="Report of the run").click()
    page.wait_for_url("**/index.html")


@pytest.mark.parametrize("name", ["index.html", "layers-attn1.html"])
@pytest.mark.parametrize("viewport", [PHONE, DESK], ids=["phone", "desk"])
def test_no_page_is_wider_than_its_window(visit, name, viewport):
    page = visit(name, viewport, color_scheme="dark")
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= viewport["width"]
    ground, ink = page.evaluate(
        "['backgroundColor', 'color'].map(key => getComputedStyle(document.body)[key]"
        ".match(/[0-9]+/g).reduce((sum, part) => sum + Number(part), 0))"
    )
    assert ground < 3 * 64 < 3 * 192 < ink, "dark ground, light ink"


def test_everything_that_acts_has_a_name(visit):
    acting = "a, button, input, select, table, video, summary, [role=group]"
    nameless = visit().evaluate(
        """acting => [...document.querySelectorAll(`${acting}, [role=region], [role=img]`)]
            .filter(each => !each.ariaLabel?.trim() && !each.innerText?.trim()
                && !each.labels?.length && !each.querySelector("title"))
            .map(each => each.outerHTML.slice(0, 200))""",
        acting,
    )
    assert not nameless


@contextmanager
def counting_server():
    """Its address, and what it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched(browser, report):
    page = browser.new_page()
    page.goto(report.as_uri())
    with counting_server() as (address, asked):
        page.evaluate(
            """address => {
                const script = document.createElement("script");
                script.textContent = "window.ran = true";
                const image = Object.assign(new Image(), { src: `${address}/image` });
                const video = document.createElement("video");
                video.src = `${address}/video`;
                document.body.append(script, image, video);
                document.body.insertAdjacentHTML("beforeend", '<b onclick="ran = true">x</b>');
                document.querySelector("b[onclick]").click();
                return fetch(`${address}/fetch`).catch(() => {});
            }""",
            address,
        )
        assert page.evaluate("window.ran") is None
        page.wait_for_timeout(200)
        assert asked == []
        page.goto(f"{address}/by-hand")
        assert asked == ["/by-hand"], "the server does count"
    page.close()
