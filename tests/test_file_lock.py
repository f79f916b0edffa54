"""Locks of files: waiting is tested where it matters, in tests/data/test_buckets.py."""

import errno
import fcntl

from qvgen_jax.file_lock import locked


def test_a_lock_that_is_free_is_taken_without_a_word(tmp_path):
    told = []
    with locked(tmp_path / "new", "part.", told.append), locked(tmp_path / "new", "", told.append):
        assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock", ".part.lock"]
    with locked(tmp_path / "new", "part.", told.append):
        assert told == []


def test_a_file_system_without_locks_is_told_and_worked_on(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    told = []
    with locked(tmp_path, log=told.append):
        told.append("worked")
    warning = f"warning: {tmp_path / '.lock'} cannot be locked (No locks available)"
    assert told == [f"{warning}; keep other runs out", "worked"]
