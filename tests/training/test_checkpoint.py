"""Checkpoints that are damaged, cannot be written, or must stay."""

import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.faults import DAMAGES, damage
from qvgen_jax.errors import UserError
from qvgen_jax.training import checkpoint
from qvgen_jax.training.checkpoint import Checkpoints
from qvgen_jax.training.checksums import changed, checksums
from qvgen_jax.training.lock import alone_in


def state_of(step: int) -> dict:
    rng = np.random.default_rng(step)
    return {
        "params": {"kernel": jnp.asarray(rng.standard_normal((40, 30), np.float32))},
        "levels": {"codes": jnp.asarray(rng.integers(-8, 8, (5, 7), np.int8))},
        "opt": (jnp.asarray(rng.standard_normal(9), jnp.bfloat16),),
        "step": jnp.int32(step),
    }


def like(step: int) -> dict:
    return jax.eval_shape(lambda: state_of(1))


def written(workdir: Path, *steps: int, keep: int = 3) -> None:
    with Checkpoints(workdir, keep) as checkpoints:
        for step in steps:
            checkpoints.save(state_of(step))
            checkpoints.finish()


def assert_equal(state: dict, step: int) -> None:
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_of(step)), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_every_single_bit_counts_and_so_does_the_place():
    state = {"a": jnp.arange(12, dtype=jnp.float32).reshape(3, 4), "b": jnp.ones(5, jnp.bfloat16)}
    before = np.asarray(checksums(state))
    words = np.asarray(state["a"]).view(np.uint32)
    for row, column, bit in ((0, 0, 0), (1, 3, 31), (2, 2, 17)):
        flipped = words.copy()
        flipped[row, column] ^= np.uint32(1 << bit)
        other = {**state, "a": jnp.asarray(flipped.view(np.float32))}
        assert changed(other, before) == ["['a']"]
    assert changed({**state, "a": state["a"][::-1]}, before) == ["['a']"]
    assert changed({**state, "b": -state["b"]}, before) == ["['b']"]
    assert changed(state, before) == []


@pytest.mark.parametrize("dtype", [jnp.bool_, jnp.int8, jnp.bfloat16, jnp.int32, jnp.float32])
def test_checksums_take_every_type(dtype):
    x = jnp.asarray(np.random.default_rng(0).integers(0, 2, (6, 3)), dtype)
    assert changed([x], np.asarray(checksums([x]))) == []
    assert changed(
        [x.at[5, 2].set(~x[5, 2] if dtype == jnp.bool_ else 1 - x[5, 2])],
        np.asarray(checksums([x])),
    )


def test_the_newest_is_what_was_saved_and_boundaries_stay(tmp_path):
    with Checkpoints(tmp_path, 2, always=(2,)) as checkpoints:
        assert checkpoints.newest(like) is None
        for step in (1, 2, 3, 4, 5):
            checkpoints.save(state_of(step))
        checkpoints.finish()
        assert checkpoints.steps() == [2, 4, 5]
    with Checkpoints(tmp_path, 2) as checkpoints:
        assert_equal(checkpoints.newest(like), 5)


def data_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(tmp_path, how, capsys):
    """Or the damage lies where nothing is read from; never is another state taken for the right."""
    whole = tmp_path / "whole"
    written(whole, 1, 2)
    recovered = 0
    for seed in range(12):
        rng, workdir = random.Random(seed), tmp_path / f"{how}{seed}"
        shutil.copytree(whole, workdir)
        damage(rng.choice(data_files(workdir / "checkpoints/2")), how, rng)
        with Checkpoints(workdir, 3) as checkpoints:
            state = checkpoints.newest(like)
        assert_equal(state, int(state["step"]))
        if int(state["step"]) == 1:
            recovered += 1
            assert "warning: checkpoint 2 is damaged" in capsys.readouterr().err
            assert (workdir / "damaged-checkpoint-2-0").is_dir()
            assert not (workdir / "checkpoints/2").exists()
    assert recovered


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    written(tmp_path, 1, 2)
    for step in (1, 2):
        for path in data_files(tmp_path / f"checkpoints/{step}"):
            path.write_bytes(b"")
    with (
        Checkpoints(tmp_path, 3) as checkpoints,
        pytest.raises(UserError, match=r"all checkpoints of .* are damaged \(steps \[2, 1\]"),
    ):
        checkpoints.newest(like)


def test_a_checkpoint_with_other_bits_than_were_saved_is_told_by_its_arrays(tmp_path, monkeypatch):
    written(tmp_path, 1)
    actual = checkpoint.checksums
    monkeypatch.setattr(checkpoint, "checksums", lambda state: actual(state).at[0].add(1))
    written(tmp_path, 2)
    monkeypatch.undo()
    with Checkpoints(tmp_path, 3) as checkpoints:
        assert_equal(checkpoints.newest(like), 1)
    assert (tmp_path / "damaged-checkpoint-2-0").is_dir()


def test_a_save_that_fails_is_tried_again_and_then_given_up_with_the_last_good_step(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "_PAUSES", (0, 0))
    save, failures = checkpoint.ocp.CheckpointManager.save, [2]

    def failing(self, step, **arguments):
        if failures[0]:
            failures[0] -= 1
            raise OSError(28, "No space left on device")
        return save(self, step, **arguments)

    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "save", failing)
    with Checkpoints(tmp_path, 5) as checkpoints:
        checkpoints.save(state_of(1))  # Fails, as an asynchronous write would: told at the next.
        checkpoints.save(state_of(2))  # Fails once more, then not.
        assert checkpoints.steps() == [2]
        assert "No space left on device); trying again" in capsys.readouterr().err
        failures[0] = 99
        checkpoints.save(state_of(3))
        with pytest.raises(UserError, match=r"No space left .* the last good checkpoint is step 2"):
            checkpoints.save(state_of(4))
        failures[0] = 0
        checkpoints.save(state_of(5))
    with Checkpoints(tmp_path, 5) as checkpoints:
        assert checkpoints.steps() == [2, 5]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 2 MiB of its own."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_on_a_full_disk_the_run_stops_with_the_last_good_step_and_has_it(
    small_disk, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "_PAUSES", (0, 0))
    rng = np.random.default_rng(0)  # Noise: it takes its bytes on any disk.
    states = {
        step: {"step": jnp.int32(step), "x": jnp.asarray(rng.standard_normal(100_000, np.float32))}
        for step in range(1, 12)
    }

    def save_all() -> None:
        with Checkpoints(small_disk, 20) as checkpoints:
            for state in states.values():
                checkpoints.save(state)

    with pytest.raises(UserError, match=r"cannot be written to .* last good checkpoint is step"):
        save_all()
    assert "trying again" in capsys.readouterr().err
    with Checkpoints(small_disk, 20) as checkpoints:
        last = checkpoints.steps()[-1]
        found = checkpoints.newest(lambda step: jax.eval_shape(lambda: states[1]))
    assert 0 < last < 11
    np.testing.assert_array_equal(found["x"], states[last]["x"])


def test_on_a_disk_that_became_read_only_the_run_stops_and_has_its_last_good_step(
    small_disk, monkeypatch, capsys
):
    monkeypatch.setattr(checkpoint, "_PAUSES", (0, 0))

    def save_more() -> None:
        with Checkpoints(small_disk, 5) as checkpoints:
            checkpoints.save(state_of(1))
            checkpoints.finish()
            subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
            for step in range(2, 5):
                checkpoints.save(state_of(step))

    with pytest.raises(UserError, match=r"may only be read.*last good checkpoint is step 1"):
        save_more()
    assert "trying again" in capsys.readouterr().err
    with Checkpoints(small_disk, 5) as checkpoints:  # It is read even so.
        found = checkpoints.newest(lambda step: jax.eval_shape(lambda: state_of(1)))
    assert int(found["step"]) == 1


def test_a_read_only_workdir_is_refused_at_the_start(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for workdir in (small_disk, small_disk / "new"):
        with (
            pytest.raises(UserError, match=r"cannot be written to \(Read-only file system\): give"),
            alone_in(workdir),
        ):
            pass
