"""`--job serve`: the config's model and the run's export behind a local web page."""

import dataclasses
import importlib.util
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from qvgen_jax.errors import UserError
from qvgen_jax.evaluation.samples import load_to_generate
from qvgen_jax.hosts import is_alone
from qvgen_jax.mesh import mesh_to_generate
from qvgen_jax.pipeline import Pipeline
from qvgen_jax.serve.generate import Studio

_FONT = ["system-ui", "sans-serif"]


def serve(config: Mapping, workdir: Path, host: str, port: int) -> None:
    """Serves the page until it is interrupted or terminated; both leave no files behind.

    Args:
        config: of a run; reads `model`, `text_weights`, `compute_dtype` and `kernels`.
        workdir: of the run; its `export` is the low-bit side.
        host: the address to listen at; another than this machine's own lets the network in.
        port: of TCP.

    Raises:
        UserError: Gradio is missing, the address is not to be had, several processes, or a model
            that does not load.
    """
    check_address(host, port)
    check_gradio()
    if not is_alone():
        raise UserError("--job serve runs in one process; start it without the others")
    studio = open_studio(config, workdir)
    # A service is ended by SIGTERM, whose own action would leave the folder.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="qvgen-serve-") as folder:
            page = start(studio, Path(folder), Path(config["model"]).name, host, port)
            try:
                _tell(host, port)
                threading.Event().wait()
            finally:
                page.close(verbose=False)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell(host: str, port: int) -> None:
    if not is_local(host):
        print(
            f"warning: --host {host} lets anybody in the network use this machine; there is no "
            "password",
            file=sys.stderr,
        )
    print(f"serving on http://{in_address(host)}:{port}; Ctrl-C ends it", flush=True)


def start(studio: Studio, folder: Path, title: str, host: str, port: int):
    """The page, being served by a thread of its own: a `gradio.Blocks`, to be closed.

    Args:
        studio: the models.
        folder: an empty one for the videos; what was shown is kept there for an hour or longer.
        title: of the page.
        host, port: where to listen.

    Raises:
        UserError: the address is not to be had any more.
    """
    _pass_proxies_by(host)
    # Read as Gradio is imported; it would tell its makers of launches, and ask them for news.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["GRADIO_TEMP_DIR"] = str(folder / "shown")
    import gradio

    from qvgen_jax.serve.page import build_page
    from qvgen_jax.serve.panels import CSS
    from qvgen_jax.serve.protection import middleware

    written = folder / "written"
    written.mkdir()
    page = build_page(studio, written, title)
    names = [in_address(host)] if is_local(host) else []
    try:
        page.launch(
            server_name=in_address(host),
            server_port=port,
            share=False,
            ssr_mode=False,
            mcp_server=False,
            enable_monitoring=False,
            run_history=False,
            pwa=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            max_file_size=1,  # Byte: nothing is uploaded here.
            css=CSS,
            # Of the system: Gradio's own are served by this machine too, but late.
            theme=gradio.themes.Default(font=_FONT, font_mono=["monospace"]),
            app_kwargs={"middleware": middleware(names)},
        )
    except OSError as error:
        raise _not_to_be_had(host, port, error) from error
    return page


def _pass_proxies_by(host: str) -> None:
    """Gradio's start asks its own server whether it runs, which no proxy knows; names everybody's
    address by this machine's."""
    kept = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    listed = ",".join(filter(None, (kept, host, "localhost")))
    os.environ.update(no_proxy=listed, NO_PROXY=listed)


def open_studio(config: Mapping, workdir: Path) -> Studio:
    """Both pipelines, sharing the teacher's text encoder and VAE, which training leaves alone.

    Raises:
        UserError: a model does not load, or the export's configurations are of another one; its
            weights are not compared.
    """

    def loaded(folder: str | Path) -> Pipeline:
        print(f"loading {folder}", flush=True)
        return load_to_generate(config, folder, config["compute_dtype"], mesh_to_generate())

    teacher, export = loaded(config["model"]), workdir / "export"
    if not (export / "model_index.json").is_file():
        why = (
            f"{workdir} has no export yet, so there is full precision only. "
            "--job train ends with one; --job export packs a run that has ended."
        )
        return Studio(teacher, None, why)
    return Studio(teacher, _sharing(teacher, loaded(export), export))


def _sharing(teacher: Pipeline, student: Pipeline, export: Path) -> Pipeline:
    for part in ("transformer", "vae", "text_encoder"):
        if getattr(teacher, part).config != getattr(student, part).config:
            raise _of_another_model(export, part)
    if teacher.scheduler != student.scheduler:
        raise _of_another_model(export, "scheduler")
    return dataclasses.replace(
        student, vae=teacher.vae, text_encoder=teacher.text_encoder, tokenizer=teacher.tokenizer
    )


def _of_another_model(export: Path, part: str) -> UserError:
    return UserError(
        f"{export} was made from another model: its {part} has another configuration; give the "
        "--config that the run was made with"
    )


def check_gradio() -> None:
    """Raises `UserError` where Gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError(
            "--job serve needs Gradio, which is not installed; run "
            "pip install -c constraints.txt -e '.[serve]'"
        )


def check_address(host: str, port: int) -> None:
    """Raises `UserError` where the address is not to be had; told before models are loaded."""
    if not 1 <= port <= 65535:
        raise UserError(f"--port is {port}, expected 1 to 65535")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _not_to_be_had(host, port, error) from error


def _not_to_be_had(host: str, port: int, error: OSError) -> UserError:
    return UserError(
        f"cannot listen at {in_address(host)}:{port} ({error.strerror or error}); give another "
        "--port, or as --host an address of this machine"
    )


def in_address(host: str) -> str:
    """As URLs write it: an address of IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
