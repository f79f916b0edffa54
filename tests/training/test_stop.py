"""Signals, the lock of a workdir, and the watchdog: what ends a run before its last step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qvgen_jax.errors import Preempted, UserError
from qvgen_jax.training.lock import LOCK, alone_in
from qvgen_jax.training.stop import Stop

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGTERM, Preempted), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_waits_for_the_step_to_end(number, raised, capfd):
    before = signal.getsignal(number)
    with Stop() as stop:
        assert not stop.asked(6)
        os.kill(os.getpid(), number)
        assert stop.asked(7)
        assert "once more leaves at once" in capfd.readouterr().err
        with pytest.raises(raised) as error:
            stop.leave(7)
    assert raised is KeyboardInterrupt or "step 7 is saved" in str(error.value)
    assert signal.getsignal(number) == before


def python(code: str, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, **pipes, **options)


def test_a_second_signal_leaves_at_once():
    process = python(
        "import time\nfrom qvgen_jax.training.stop import Stop\n"
        "with Stop():\n    print('listens')\n    time.sleep(60)\n    time.sleep(60)\n"
    )
    assert process.stdout.readline() == "listens\n"
    process.send_signal(signal.SIGTERM)
    assert "once more" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_the_second_run_in_a_workdir_is_refused_until_the_first_is_gone(tmp_path):
    holder = python(
        "from pathlib import Path\nimport time\nfrom qvgen_jax.training.lock import alone_in\n"
        f"with alone_in(Path({str(tmp_path)!r})):\n    print('holds')\n    time.sleep(600)\n"
    )
    assert holder.stdout.readline() == "holds\n"
    with (
        pytest.raises(UserError, match=rf"another run is at work in .*process {holder.pid} on"),
        alone_in(tmp_path),
    ):
        raise AssertionError
    holder.kill()  # As a crash: nobody cleans up.
    holder.wait()
    assert (tmp_path / LOCK).is_file()
    with alone_in(tmp_path):
        assert f"process {os.getpid()}" in (tmp_path / LOCK).read_text()
    with alone_in(tmp_path):
        pass


def test_a_step_that_never_ends_is_ended_with_all_stacks():
    process = python(
        "import time\nfrom qvgen_jax.training.watchdog import Watchdog\n"
        "def stuck_in_a_loader():\n    time.sleep(600)\n"
        "with Watchdog(1 / 60) as watchdog:\n"
        "    for _ in range(4):\n        time.sleep(0.5)\n        watchdog.fed()\n"
        "    print('went on')\n    stuck_in_a_loader()\n"
    )
    start = time.monotonic()
    out, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out == "went on\n"  # Two seconds, each fed in time.
    assert "stuck_in_a_loader" in told
    assert time.monotonic() - start < 60


def test_without_minutes_nobody_watches():
    process = python(
        "import time\nfrom qvgen_jax.training.watchdog import Watchdog\n"
        "with Watchdog(0) as watchdog:\n    watchdog.fed()\n    time.sleep(0.2)\n"
    )
    assert process.wait(60) == 0
