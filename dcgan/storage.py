"""A directory that is either complete or absent: staged aside, hashed file by file, renamed into place, verified.

Image stores and checkpoints are both such directories. `manifest.json` is written last and lists every other file
with its length and SHA-256; a directory without a valid manifest does not exist.
"""

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class CorruptError(RuntimeError):
    """A stored directory is not what its manifest says; the message names the file."""


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


@contextmanager
def staging(parent: Path) -> Iterator[Path]:
    """A fresh directory beside the final ones, removed at exit unless `publish` has renamed it.

    What a killed process left behind on this host is removed first.
    """
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    staged = parent / f".staging-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    staged.mkdir()
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    prefix = f".staging-{socket.gethostname()}-"
    for path in parent.glob(f"{prefix}*"):
        pid = int(path.name.removeprefix(prefix).split("-")[0])
        if not _alive(pid):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def seal(directory: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write the manifest: `metadata` and, under `files`, each file's bytes and SHA-256. Returns the manifest."""
    files = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[path.relative_to(directory).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    manifest = {**metadata, "files": files}
    write_json(directory / MANIFEST, manifest)
    return manifest


def publish(staged: Path, destination: Path) -> None:
    """Rename a sealed directory into place. If the destination is already there, it stays and `staged` is dropped."""
    try:
        os.rename(staged, destination)
    except OSError:
        if not (destination / MANIFEST).is_file():
            raise
    descriptor = os.open(destination.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fingerprint(directory: Path) -> str:
    """The first 16 hex digits of the manifest's SHA-256: it covers every byte, through the hashes in the manifest."""
    return sha256(directory / MANIFEST)[:16]


def read_manifest(directory: Path, hashes: bool = True) -> dict[str, Any]:
    """The manifest of a stored directory, after checking its files: lengths, and hashes if `hashes`.

    Raises CorruptError, naming the file, if the manifest is missing or unreadable or a file differs from it.
    """
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptError(f"{path} is missing or unreadable: {error}") from error
    for name, expected in files:
        file = directory / name
        if not file.is_file():
            raise CorruptError(f"{file} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CorruptError(f"{file} has {file.stat().st_size} bytes; its manifest says {expected['bytes']}")
        if hashes and sha256(file) != expected["sha256"]:
            raise CorruptError(f"{file} is corrupt: its SHA-256 differs from the manifest's")
    return manifest
