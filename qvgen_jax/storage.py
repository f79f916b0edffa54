"""Runs, data and models in object storage: `gs://bucket/...`, and what else etils.epath opens.

A run works in a local folder, its copy. Checkpoints go to the bucket themselves, from every process
its own slices. The other files of the workdir are copied there by the first process, after every
checkpoint and when a job ends, and from there when a process starts without them. Videos, encoded
clips and models are copied from there before they are read.
"""

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from etils import epath

from qvgen_jax import hosts
from qvgen_jax.errors import UserError
from qvgen_jax.json_file import read_object

_ADDRESS = re.compile(r"[a-z0-9]+://")
_ORIGIN = ".origin"  # In a copy: the address it is of.
_PUSHED = ".pushed.json"  # In a copy: size and time of each file as it was pushed.
_APART = ("checkpoints",)  # Of a workdir: written to the bucket directly.
_BLOCK = 1 << 24  # Bytes that are copied at once.
_PACKAGES = {"gs": "gcsfs", "s3": "s3fs", "az": "adlfs"}


def is_remote(path: str | Path) -> bool:
    """Whether this is an address in object storage, not a folder of this machine."""
    return bool(_ADDRESS.match(str(path)))


def workdir(path: str) -> Path:
    """The folder to work in: the path itself, or the copy of a remote one, brought up to date.

    Raises:
        UserError: the bucket cannot be read.
    """
    if not is_remote(path):
        return Path(path)
    copy = _copy_of(path)
    copy.mkdir(parents=True, exist_ok=True)
    (copy / _ORIGIN).write_text(path)
    _pull(path, copy, apart=_APART)
    return copy


def local(path: str | Path) -> Path:
    """A folder that can be read here: the path itself, or a copy of a remote one, made if need be.

    Raises:
        UserError: the bucket cannot be read, or there is nothing at the address.
    """
    if not is_remote(path):
        return Path(path)
    return _fetched(str(path), _copy_of(str(path)))


@functools.cache  # Listing a bucket takes a request a file: once in a process.
def _fetched(address: str, copy: Path) -> Path:
    if not _pull(address, copy):
        raise UserError(f"{address} is empty or does not exist; give the address of a folder")
    return copy


def checkpoints(workdir: Path) -> epath.Path:
    """Where a workdir's checkpoints are: in it, or in the bucket that it is a copy of."""
    origin = workdir / _ORIGIN
    base = epath.Path(origin.read_text()) if origin.is_file() else epath.Path(workdir).absolute()
    return base / "checkpoints"


def push(workdir: Path, *, last: bool = False) -> None:
    """Copy what changed in a workdir to the bucket, if it is a copy; the first process does.

    A bucket that does not answer is told on stderr and tried again at the next call.

    Args:
        workdir: of the run.
        last: no other call will follow: then it is an error.

    Raises:
        UserError: `last`, and the bucket does not take it; the files stay in the copy.
    """
    origin = workdir / _ORIGIN
    if not origin.is_file() or not hosts.is_first():
        return
    address = origin.read_text()
    try:
        with _understood(address):
            _push(workdir, epath.Path(address))
    except UserError as error:
        if last:
            raise UserError(f"{error}; until then what is new is in {workdir}") from error
        print(f"warning: {error}", file=sys.stderr, flush=True)


def _copy_of(address: str) -> Path:
    """Where the copy of an address lies on this machine."""
    base = os.environ.get("QVGEN_CACHE") or Path("~/.cache/qvgen_jax").expanduser()
    name = re.sub(r"[^\w.-]+", "-", _ADDRESS.sub("", address)).strip("-")
    mark = hashlib.sha256(address.rstrip("/").encode()).hexdigest()[:8]
    return Path(base) / f"{name[-80:]}-{mark}"


def _pull(address: str, copy: Path, apart: tuple[str, ...] = ()) -> int:
    """Copy what is not there yet, or older, but for folders `apart`; how many files there are."""
    count = 0
    with _understood(address):
        base = epath.Path(address)
        for name, path in _remote_files(base, PurePosixPath(), apart):
            count += 1
            target, theirs = copy / name, path.stat()
            if target.is_file():
                ours = target.stat()
                # Of a workdir, what was written here last and not pushed stays.
                kept = ours.st_size == theirs.length or (copy / _ORIGIN).is_file()
                if kept and ours.st_mtime >= theirs.mtime:
                    continue
            target.parent.mkdir(parents=True, exist_ok=True)
            # Processes that share a machine may copy at once: each its own, the last one stays.
            partial = target.with_name(f"{target.name}.{os.getpid()}.part")
            with path.open("rb") as source, partial.open("wb") as sink:
                shutil.copyfileobj(source, sink, _BLOCK)
            partial.replace(target)
    return count


def _remote_files(
    base: epath.Path, below: PurePosixPath, apart: tuple[str, ...]
) -> Iterator[tuple[PurePosixPath, epath.Path]]:
    """(name, path) of each file under an address, but for the folders `apart`."""
    folder = base / str(below) if below.parts else base
    if not folder.exists():
        return
    for path in folder.iterdir():
        name = below / path.name
        if path.is_dir():
            if str(name) not in apart:
                yield from _remote_files(base, name, apart)
        else:
            yield name, path


def _push(workdir: Path, base: epath.Path) -> None:
    record = workdir / _PUSHED
    pushed = {}
    if record.is_file():
        pushed = read_object(record, "delete it: then everything is written once more")
    for path in sorted(workdir.rglob("*")):
        name = path.relative_to(workdir)
        if name.parts[0] in _APART or path.name[0] == "." or path.suffix in (".tmp", ".part"):
            continue
        if not path.is_file():
            continue
        stat = path.stat()
        state = [stat.st_size, stat.st_mtime_ns]
        if pushed.get(str(name)) == state:
            continue
        target = base / name.as_posix()
        target.parent.mkdir(parents=True, exist_ok=True)
        with path.open("rb") as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, _BLOCK)
        pushed[str(name)] = state
        record.write_text(json.dumps(pushed))


@contextlib.contextmanager
def _understood(address: str) -> Iterator[None]:
    """Turns what a bucket's library raises into one sentence."""
    scheme = address.partition("://")[0]
    try:
        yield
    except ImportError as error:
        package = _PACKAGES.get(scheme, "fsspec and its part for " + scheme)
        raise UserError(f"{address} needs {package}: pip install {package}") from error
    except UserError:
        raise
    except Exception as error:  # Every bucket's library has its own.
        text = str(error).splitlines()[0] if str(error) else "no details"
        raise UserError(
            f"{address} cannot be reached ({type(error).__name__}: {text}); check the address and "
            "this machine's credentials, and run the same command again"
        ) from error
