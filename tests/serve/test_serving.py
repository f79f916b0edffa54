"""The command itself, in a process of its own: where it listens, and what it leaves behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import pytest

pytest.importorskip("gradio", reason="no Gradio here: pip install -e '.[serve]'")

ROOT = Path(__file__).parents[2]
PROXY = dict.fromkeys(("HTTP_PROXY", "http_proxy"), "http://127.0.0.1:9")  # Nobody answers there.


def free_port(host: str) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.bind((host, 0))
            return probe.getsockname()[1]
    except OSError:
        pytest.skip(f"this machine has no {host}")


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("127.0.0.2", marks=pytest.mark.slow),
        pytest.param("::1", marks=pytest.mark.by_hand),
    ],
)
def test_it_serves_its_address_past_a_proxy_and_leaves_nothing_when_terminated(host, tmp_path):
    where = [f"--host={host}", f"--port={free_port(host)}", f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "main.py", "--config=configs/tiny_w4a4.py", "--job=serve", *where]
    environment = os.environ | PROXY | {"TMPDIR": str(tmp_path)}
    server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("serving on "))
        address = line.split()[2].rstrip(";")
        fetch = build_opener(ProxyHandler({})).open
        assert fetch(address).status == 200
        with pytest.raises(HTTPError, match="400"):
            fetch(Request(address, headers={"Host": "elsewhere.example"}))
        assert [*tmp_path.glob("qvgen-serve-*")]
        server.terminate()
        assert server.wait(60) == 0
        assert "stopped" in server.stdout.read()
        assert not [*tmp_path.glob("qvgen-serve-*")]
    finally:
        server.kill()
        server.stdout.close()
