"""A browser for tests that look at pages, and what must not happen in one."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


def browser_path() -> str:
    """The program of a Chromium: QVGEN_BROWSER, which must be one then, or of this machine; skips
    the test where there is none."""
    for name in _NAMES:
        if path := os.environ.get("QVGEN_BROWSER") or shutil.which(name):
            return path
    pytest.skip(
        f"no {', '.join(_NAMES)} here: apt-get install chromium-headless-shell, or set "
        "QVGEN_BROWSER to the path of a Chromium"
    )


@contextmanager
def opened_page(**context) -> Iterator:
    """A Playwright page in an empty profile; `page.faults` collects what must not happen there:
    errors on its console, and requests that leave the machine."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright here: pip install -e '.[test]'"
    )
    path = browser_path()
    with playwright.sync_playwright() as driver:
        # Chromium's sandbox does not start for root in a container; the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_context(**context).new_page()
        page.faults = []
        page.on("console", lambda m: m.type == "error" and page.faults.append(m.text))
        page.on("pageerror", lambda error: page.faults.append(str(error)))
        page.on("request", lambda request: _local(request.url) or page.faults.append(request.url))
        yield page
        browser.close()


def _local(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("data", "blob", "file", "about") or parts.hostname in (
        "127.0.0.1",
        "localhost",
    )
