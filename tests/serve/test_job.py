"""Where the page is served, and what with."""

import json
import shutil
import socket
import sys

import pytest

from configs.tiny_w4a4 import get_config
from qvgen_jax.errors import UserError
from qvgen_jax.serve import job

CONFIG = get_config().to_dict()


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port} .*another --port"):
            job.check_address("127.0.0.1", port)
    job.check_address("127.0.0.1", port)


HERE = ("127.0.0.1", "127.1.2.3", "::1", "localhost")
ELSEWHERE = ("0.0.0.0", "::", "10.0.0.7", "example.org")


@pytest.mark.parametrize("host", HERE + ELSEWHERE)
def test_only_loopback_addresses_are_this_machines_alone(host):
    assert job.is_local(host) is (host in HERE)


def test_addresses_of_ipv6_are_written_in_brackets():
    assert job.in_address("::1") == "[::1]"
    assert job.in_address("127.0.0.2") == "127.0.0.2"


def test_without_gradio_the_command_that_installs_it_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install .*\[serve\]"):
        job.check_gradio()


def test_without_an_export_there_is_full_precision_alone_and_the_reason(tmp_path):
    studio = job.open_studio(CONFIG, tmp_path)
    assert studio.student is None
    assert "--job export" in studio.why_alone


def test_both_sides_share_what_is_the_same(tmp_path):
    shutil.copytree("assets/tiny_wan", tmp_path / "export")
    studio = job.open_studio(CONFIG, tmp_path)
    assert studio.student.vae is studio.teacher.vae
    assert studio.student.text_encoder is studio.teacher.text_encoder
    assert studio.student.transformer is not studio.teacher.transformer


@pytest.mark.parametrize(
    ("part", "file", "change"),
    [
        ("vae", "config.json", {"latents_mean": [1.0] * 16}),
        ("scheduler", "scheduler_config.json", {"flow_shift": 7.0}),
    ],
)
def test_an_export_of_another_model_is_refused(tmp_path, part, file, change):
    shutil.copytree("assets/tiny_wan", tmp_path / "export")
    path = tmp_path / "export" / part / file
    fields = json.loads(path.read_text())
    assert fields != fields | change
    path.write_text(json.dumps(fields | change))
    with pytest.raises(UserError, match=f"its {part} has another configuration"):
        job.open_studio(CONFIG, tmp_path)
