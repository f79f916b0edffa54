"""A browser for tests that look at pages, and what must not happen in one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def browser_path() -> str:
    """The program of a Chromium: QVGEN_BROWSER, or one of this machine.

    Fails the test where the named one does not exist; skips it where none is named, and none here.
    """
    if named := os.environ.get("QVGEN_BROWSER"):
        return shutil.which(named) or pytest.fail(
            f"QVGEN_BROWSER is {named!r}, and there is no such program; name one, or unset it"
        )
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(
        f"no {', '.join(_NAMES)} here: apt-get install chromium-headless-shell, or set "
        "QVGEN_BROWSER to the path of a Chromium"
    )


@contextmanager
def opened_browser() -> Iterator:
    """A Playwright browser; skips the test where Playwright or a Chromium is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright here: pip install -e '.[test]'"
    )
    path = browser_path()
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not start for root in a container; the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def new_page(browser, **context):
    """A page in an empty profile; it ends with the browser, or `page.context.close()`.

    `page.faults` collects what must not happen there: errors on its console, requests that leave
    the machine, and those that fail. `page.asked` are the addresses of all requests.
    """
    page = browser.new_context(**context).new_page()
    page.faults, page.asked = [], []

    def asked(request) -> None:
        page.asked.append(request.url)
        if not _local(request.url):
            page.faults.append(request.url)

    def failed(request) -> None:
        if "net::ERR_ABORTED" not in request.failure:  # The page let go of it: a video, a stream.
            page.faults.append(f"{request.url} {request.failure}")

    page.on("console", lambda m: m.type == "error" and page.faults.append(m.text))
    page.on("pageerror", lambda error: page.faults.append(str(error)))
    page.on("request", asked)
    page.on("requestfailed", failed)
    return page


def _local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "file", "about") or parts.hostname in (
        "127.0.0.1",
        "localhost",
    )
