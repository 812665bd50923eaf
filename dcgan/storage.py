"""Directories that are either complete or absent: staged aside, hashed file by file, renamed into place, verified.

Image stores, checkpoints and feature banks are such directories. `manifest.json` is written last and lists every other
file with its length and SHA-256; a directory without a valid manifest counts as absent.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
RETRY = 0.05  # seconds between attempts to get a lock


class CorruptError(RuntimeError):
    """A stored directory is not what its manifest says; the message names the file."""


class BusyError(RuntimeError):
    """Another process is writing this directory; the message names it."""


@contextmanager
def hold(file: Path, what: str, patience: float = 0.0) -> Iterator[None]:
    """Hold a lock file, until the process dies at the latest. Raises BusyError after `patience` seconds of waiting."""
    deadline = time.monotonic() + patience
    with file.open("a+") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    lock.seek(0)
                    raise BusyError(f"{what} is being written by process {lock.read().strip()}") from error
                time.sleep(RETRY)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_below(name: str) -> bool:
    """Whether a name from elsewhere, its parts separated by slashes, is the path of a file below a directory."""
    return not {"", ".", ".."} & set(name.split("/")) and "\0" not in name


def sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dump_json(value: Any) -> str:
    """The one JSON form used for everything that is hashed or compared: sorted keys, two spaces, no NaN."""
    return json.dumps(value, sort_keys=True, indent=2, allow_nan=False) + "\n"


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content` so that a reader sees the old bytes or the new ones, never a mixture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of `dump_json(value)`."""
    write_bytes(path, dump_json(value).encode())


def once(path: Path, work: Callable[[], Any]) -> Any:
    """The JSON value in `path`; if there is no such file, first what `work()` returns is written there."""
    if not path.is_file():
        write_json(path, work())
    return json.loads(path.read_bytes())


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A fresh directory next to the final ones, removed at exit unless `publish` has renamed it.

    It is locked, so that what killed processes left behind, on any host, is told from it and removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for abandoned in parent.glob(".staging-*"):
        with suppress(FileNotFoundError, BlockingIOError), _alone(abandoned):
            shutil.rmtree(abandoned, ignore_errors=True)
    staged, descriptor = _fresh(parent)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        os.close(descriptor)


def _fresh(parent: Path) -> tuple[Path, int]:
    """A new directory and the descriptor that holds its lock; before that, another process may have removed it."""
    while True:
        staged = parent / f".staging-{secrets.token_hex(8)}"
        staged.mkdir()
        with suppress(FileNotFoundError):
            descriptor = os.open(staged, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if staged.exists():
                return staged, descriptor
            os.close(descriptor)


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold a directory's lock. Raises BlockingIOError if another process does."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def seal(directory: Path, metadata: Mapping[str, Any]) -> None:
    """Write the manifest: `metadata` and, under `files`, each file's bytes and SHA-256."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        flush(path)
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    write_json(directory / MANIFEST, {**metadata, "files": files})


def publish(staged: Path, destination: Path) -> None:
    """Rename a sealed directory into place. If the destination is already there, it stays and `staged` is dropped."""
    flush(staged)
    try:
        os.rename(staged, destination)
    except OSError:
        if not (destination / MANIFEST).is_file():
            raise
    flush(destination.parent)


def flush(path: Path) -> None:
    """Flush a file's bytes, or the names in a directory, to disk: a file's own fsync does not do the latter."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def discard(directory: Path) -> None:
    """Remove a stored directory. It is renamed aside first, so no reader ever finds half of it."""
    with staging(directory.parent) as aside:
        os.rename(directory, aside / directory.name)


def fingerprint(directory: Path) -> str:
    """The `digest` of the manifest: it covers every byte, through the hashes in the manifest."""
    return digest((directory / MANIFEST).read_bytes())


def digest(manifest: bytes) -> str:
    """The first 16 hex digits of the SHA-256."""
    return hashlib.sha256(manifest).hexdigest()[:16]


def read_manifest(directory: Path, hashes: bool = True, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """The manifest of a stored directory, after checking its files: lengths, and hashes if `hashes`.

    share: (i, n) checks the hash of every n-th file from i on, so that n processes together check them all.
    Raises CorruptError, naming the file, if the manifest is missing or unreadable or a file differs from it.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = [(directory / name, entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is missing or unreadable: {error}") from error
    for number, (file, size, digest) in enumerate(files):
        if not file.is_file():
            raise CorruptError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CorruptError(f"{file} has {file.stat().st_size} bytes; its manifest says {size}")
        if hashes and number % share[1] == share[0] and sha256(file) != digest:
            raise CorruptError(f"{file} is corrupt: its SHA-256 differs from the manifest's")
    return manifest
