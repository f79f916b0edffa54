"""Checkpoints through orbax: the whole train state, atomic, asynchronous, resumed exactly.

Random keys, the data position, rank and gate are functions of `step`, so the state dict is all
that must be kept. `config.json` in the workdir says which run it belongs to.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from qvgen_jax import hosts, storage
from qvgen_jax.errors import UserError

# Sections of a config that decide what the run computes; the others may change between calls.
_FIXED = ("model", "compute_dtype", "data", "quant", "train", "seed", "vae_train", "flow")
_FREE_KEYS = (
    "log_every",
    "profile_steps",
    "log_spectrum",
    "checkpoint_every",
    "checkpoint_seconds",
    "keep_checkpoints",
    "remat",
    "table_steps",  # Of the export alone.
)


def open_checkpoints(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of a workdir's checkpoints, see `storage`; the newest `keep` are kept."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(storage.checkpoints(workdir), options=options)


def save(manager: ocp.CheckpointManager, state: dict) -> None:
    """Start saving `state` under its step; returns at once, the write goes on behind."""
    step = int(state["step"])
    if step not in manager.all_steps():
        manager.save(step, args=ocp.args.StandardSave(state))


def restore(manager: ocp.CheckpointManager, step: int, like: dict) -> dict:
    """The state saved at `step`, with the structure, shapes and shardings of `like`."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    return manager.restore(step, args=ocp.args.StandardRestore(abstract))


def newest_or(manager: ocp.CheckpointManager, fresh: dict) -> dict:
    """The newest saved state; where there is none, `fresh`, committed."""
    step = manager.latest_step()
    return committed(fresh) if step is None else restore(manager, step, fresh)


def committed(state: dict) -> dict:
    """`state`, each array bound to where it lies, as a restored one is.

    A first start and every restart then compile one program, and the cache serves the restarts.
    """
    return jax.tree.map(lambda leaf: jax.device_put(leaf, leaf.sharding), state)


def _fingerprint(config: Mapping) -> dict:
    kept = {name: config[name] for name in _FIXED if name in config}
    for name, section in kept.items():
        if isinstance(section, Mapping):
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
    try:
        old = json.loads(record.read_text())
    except json.JSONDecodeError as error:
        raise UserError(
            f"{record} is not readable ({error}); move it away or give another --workdir"
        ) from error
    differences = _differences(_fingerprint(old), _fingerprint(config))
    if differences:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(differences[:4])}); give "
            "another --workdir, restore those values, or move the old folder away"
        )


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
