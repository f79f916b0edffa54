"""Checkpoints through orbax: the whole train state, atomic, asynchronous, resumed exactly.

Random keys, the data position, rank and gate are functions of `step`, so the state dict is all
that must be kept, and beside it the checksums of its arrays. `config.json` in the workdir says
which run it belongs to.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as preservation

from qvgen_jax import hosts, storage
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object
from qvgen_jax.training.checksums import changed, checksums

# Sections of a config that decide what the run computes; the others may change between calls.
_FIXED = ("model", "compute_dtype", "data", "quant", "train", "seed", "vae_train", "flow")
_FREE_KEYS = (
    "log_every",
    "profile_steps",
    "validate_every",
    "validate_videos",
    "export_best",
    "hang_minutes",
    "most_skipped",
    "fresh_orders",
    "log_spectrum",
    "checkpoint_every",
    "checkpoint_seconds",
    "keep_checkpoints",
    "remat",
    "table_steps",  # Of the export alone.
)
# Keys that these sections got later, with what a run did that began before: it goes on.
_ADDED = {
    "quant": {"act_range": "token", "buckets": 50, "bits_file": ""},
    "train": {
        "freeze_weights": False,
        "scale_aware": False,
        "target": "teacher",
        "teacher_weights": "float",
    },
}
_CHECKSUMS = "checksums"
_DAMAGED = "damaged-checkpoint"
_PAUSES = (1, 5, 20)  # Seconds before a failed save is tried again.


class _These(preservation.PreservationPolicy):
    """Orbax's policy for steps of a set that changes while the run goes."""

    def __init__(self, steps: set[int]):
        self._steps = steps

    def should_preserve(self, checkpoints: Sequence, *, context: object) -> list[bool]:
        return [checkpoint.step in self._steps for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints of a workdir, see `storage`; a context manager.

    Leaving it, also by an interruption, waits until the last save is complete.

    Args:
        workdir: of the run.
        keep: so many of the newest stay.
        always: steps whose checkpoints stay as well.
    """

    def __init__(self, workdir: Path, keep: int, always: Sequence[int] = ()):
        self.folder = storage.checkpoints(workdir)
        self._keep, self._always = keep, set(always)
        self._error: Exception | None = None  # Of a save that failed at once.
        self._manager = self._open()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.finish()
        except UserError:
            if error is None:  # Else what stopped the run is told, not what came of it.
                raise
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Of the complete ones, in order."""
        return sorted(self._manager.all_steps())

    def keep(self, step: int, instead_of: int | None = None) -> None:
        """From now on the checkpoint of `step` stays, and another one need not any more."""
        self._always.discard(instead_of)
        self._always.add(step)

    def save(self, state: dict) -> None:
        """Begin to save `state` under its step; returns at once, the write goes on behind.

        A save that failed since the last call is told on stderr, and this one made at once, up to
        three times.

        Raises:
            UserError: none succeeded; the message names the last good step.
        """
        step = int(state["step"])
        failure = self._failure()
        if step in self._manager.all_steps():
            return
        if failure is None:
            self._begin(step, state)
            return
        for pause in _PAUSES:
            _say(f"saving failed ({_first_line(failure)}); trying again in {pause} s")
            time.sleep(pause)
            self._reopen()
            self._begin(step, state)
            if (failure := self._failure(wait=True)) is None:
                return
        raise UserError(self._given_up(failure))

    def finish(self) -> None:
        """Wait until the last save is complete.

        Raises:
            UserError: it failed.
        """
        if (failure := self._failure(wait=True)) is not None:
            raise UserError(self._given_up(failure))

    def newest(self, like_of: Callable[[int], dict], most: int | None = None) -> dict | None:
        """The newest good state; None where there is no checkpoint.

        One that cannot be read, or whose arrays are not those that were saved, is set aside with a
        word on stderr, and the one before is tried.

        Args:
            like_of: structure, shapes and shardings of the state of a step.
            most: no newer one than of this step.

        Raises:
            UserError: there are some, and none is good.
        """
        damaged = []
        for step in reversed([step for step in self.steps() if most is None or step <= most]):
            try:
                state, reason = self._restore(step, like_of(step))
            except UserError:
                raise
            except Exception as error:  # Readers of damaged files raise whatever they stumble on.
                state, reason = None, _first_line(error)
            if hosts.agreed(state is not None):
                return state
            damaged.append(step)
            aside = self._set_aside(step)
            _say(f"checkpoint {step} is damaged ({reason}); set aside as {aside}")
        if damaged:
            raise UserError(
                f"all checkpoints of {self.folder} are damaged (steps {damaged}, now beside it as "
                f"{_DAMAGED}-...); restore one of them from a copy, or start anew with another "
                "--workdir"
            )
        return None

    def _restore(self, step: int, like: dict) -> tuple[dict | None, str]:
        """The state, or None and why it is not what was saved."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        at = getattr(abstract["step"], "sharding", None)
        count = len(jax.tree.leaves(abstract))
        sums = jax.ShapeDtypeStruct((count,), jnp.uint32, sharding=at)
        found = self._manager.restore(
            step, args=ocp.args.StandardRestore({**abstract, _CHECKSUMS: sums})
        )
        expected = np.asarray(found.pop(_CHECKSUMS))
        if names := changed(found, expected):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            return None, f"other bits than were saved in {', '.join(names[:3])}{more}"
        return found, ""

    def _open(self) -> ocp.CheckpointManager:
        policy = preservation.AnyPreservationPolicy(
            [preservation.LatestN(self._keep), _These(self._always)]
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policy, create=True, enable_async_checkpointing=True
        )
        return ocp.CheckpointManager(self.folder, options=options)

    def _reopen(self) -> None:
        with contextlib.suppress(Exception):  # It would raise the failure again.
            self._manager.close()
        self._manager = self._open()

    def _begin(self, step: int, state: dict) -> None:
        saved = {**state, _CHECKSUMS: checksums(state)}
        try:
            # Told here: where no folder can be made, orbax's threads wait five minutes for it.
            if not storage.is_remote(self.folder) and not os.access(self.folder, os.W_OK):
                gone = not self.folder.exists()
                raise OSError("it is gone" if gone else "it may only be read")
            self._manager.save(step, args=ocp.args.StandardSave(saved))
        except Exception as error:
            self._error = error

    def _failure(self, *, wait: bool = False) -> Exception | None:
        """What the last save failed of, as far as is known by now."""
        error, self._error = self._error, None
        if error is not None:
            return error
        try:
            if wait:
                self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as failure:
            return failure
        return None

    def _given_up(self, failure: Exception) -> str:
        self._reopen()
        steps = self.steps()
        last = (
            f"the last good checkpoint is step {steps[-1]}" if steps else "there is no checkpoint"
        )
        return (
            f"checkpoints cannot be written to {self.folder} ({_first_line(failure)}); {last}. See "
            "that there is space and that it may be written, and run the same command again"
        )

    def _set_aside(self, step: int) -> str:
        """Rename a step's folder so that it is none any more; its new name."""
        source = self.folder / str(step)
        name = next(
            name
            for name in (f"{_DAMAGED}-{step}-{n}" for n in range(1000))
            if not (self.folder.parent / name).exists()
        )
        if hosts.is_first():
            source.rename(self.folder.parent / name)
        hosts.barrier(f"step {step} set aside")
        self._manager.reload()
        return name


def _say(text: str) -> None:
    if hosts.is_first():
        print(f"warning: {text}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    text = str(error).strip().split("\n", 1)[0][:300]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def newest_or(checkpoints: Checkpoints, fresh: dict) -> dict:
    """The newest saved state; where there is none, `fresh`, committed."""
    state = checkpoints.newest(lambda step: fresh)
    return committed(fresh) if state is None else state


def committed(state: dict) -> dict:
    """`state`, each array bound to where it lies, as a restored one is.

    A first start and every restart then compile one program, and the cache serves the restarts.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _fingerprint(config: Mapping) -> dict:
    kept = {name: config[name] for name in _FIXED if name in config}
    for name, section in kept.items():
        if isinstance(section, Mapping):
            section = {**_ADDED.get(name, {}), **section}
            kept[name] = {k: v for k, v in section.items() if k not in _FREE_KEYS}
    return json.loads(json.dumps(kept, sort_keys=True))


def _differences(old: Mapping, new: Mapping, prefix: str = "") -> list[str]:
    found = []
    for key in sorted(set(old) | set(new)):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a!r} there, {b!r} here")
    return found


def compare_workdir(workdir: Path, config: Mapping) -> None:
    """See that the workdir is new or this run's; nothing is written.

    Raises:
        UserError: the workdir holds a run of another config; the message names what differs.
    """
    record = workdir / "config.json"
    if not record.is_file():
        return
    old = read_object(record, "move it away or give another --workdir")
    differences = _differences(_fingerprint(old), _fingerprint(config))
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences[:4])}); give "
            "another --workdir, restore those values, or move the old folder away"
        )


def is_claimed(workdir: Path) -> bool:
    """Whether a run lives there."""
    return (workdir / "config.json").is_file()


def claim_workdir(workdir: Path, config: Mapping) -> None:
    """Make the workdir this run's and write `config.json`; call when the config has proved good.

    Args:
        workdir: made if need be.
        config: plain dicts; `command`, if there, is kept for the report.

    Raises:
        UserError: see `compare_workdir`.
    """
    compare_workdir(workdir, config)
    if not hosts.is_first():
        return  # The first process writes for all.
    workdir.mkdir(parents=True, exist_ok=True)
    record = workdir / "config.json"
    partial = record.with_suffix(".tmp")
    partial.write_text(json.dumps(config, indent=1))
    partial.replace(record)
