"""A page of the report: our own style sheet and scripts are in it, and nothing else may run."""

import base64
import hashlib
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

_SCRIPTS = ("gallery.js", "tables.js")


def write_page(path: Path, title: str, body: str) -> None:
    """Writes a page.

    Args:
        path: the file; its folder exists.
        title: a text.
        body: HTML.
    """
    script = "\n".join(map(_read, _SCRIPTS))
    page = Template(_read("page.html")).substitute(
        title=escape(title),
        policy=_policy(script),
        style=_read("page.css"),
        script=script,
        body=body,
    )
    path.write_text(page, encoding="utf-8", errors="replace", newline="\n")


def _read(name: str) -> str:
    return files("qvgen_jax.evaluation.report").joinpath(name).read_text("utf-8")


def _policy(script: str) -> str:
    """Videos from the page's own folder, our script by its digest, and no address elsewhere.

    Styles stay inline, since the figures' elements carry theirs; with no address allowed, a style
    cannot tell anybody anything. `file:` is what 'self' means to a browser that opens from disk.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; "
        "media-src 'self' file:; img-src data:; base-uri 'none'; form-action 'none'"
    )
