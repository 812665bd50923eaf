"""Copies sealed directories (image stores, checkpoints) to and from `data.remote`, the manifest last."""

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

from dcgan import storage
from dcgan.remote import Remote, in_parallel

log = logging.getLogger(__name__)


def push(remote: Remote, directory: Path, at: str, there: dict[str, int]) -> None:
    """Copy a sealed directory. there: lengths of remote files, which are the same files if their lengths match."""
    known = remote.read(f"{at}/{storage.MANIFEST}")
    if known == (directory / storage.MANIFEST).read_bytes():
        return
    manifest = storage.read_manifest(directory, hashes=False)
    if known is not None:  # of another directory of this name: nothing counts as there until the files are
        remote.remove([f"{at}/{storage.MANIFEST}"])
    missing = [name for name, entry in manifest["files"].items() if there.get(name) != entry["bytes"]]
    log.info("copying %d of %d files of %s to %s", len(missing), len(manifest["files"]), directory.name, remote.url)
    in_parallel(remote.upload, [(directory / name, f"{at}/{name}") for name in missing])
    remote.write(f"{at}/{storage.MANIFEST}", (directory / storage.MANIFEST).read_bytes())


def pull(remote: Remote, at: str, directory: Path, manifest: bytes) -> None:
    """Copy a sealed directory, by way of `.pull-<name>` next to it, which survives an interruption."""
    files = json.loads(manifest)["files"]
    check_names(remote, at, files)
    staged = directory.with_name(f".pull-{directory.name}")
    staged.mkdir(parents=True, exist_ok=True)
    here = {path.name: storage.sha256(path) for path in staged.iterdir() if path.name in files}
    missing = {name: entry for name, entry in files.items() if here.get(name) != entry["sha256"]}
    log.info("copying %d of %d files of %s from %s", len(missing), len(files), directory.name, remote.url)
    in_parallel(
        remote.download,
        [(f"{at}/{name}", staged / name, entry["bytes"], entry["sha256"]) for name, entry in missing.items()],
    )
    storage.write_bytes(staged / storage.MANIFEST, manifest)
    storage.publish(staged, directory)
    shutil.rmtree(staged, ignore_errors=True)  # left if a copy was here already


def check_names(remote: Remote, at: str, names: Iterable[str]) -> None:
    """Raise CorruptError for a name that would be written elsewhere: whoever writes to the remote chooses them."""
    for name in names:
        if not storage.is_below(name):
            raise storage.CorruptError(f"{remote.url}/{at} has a file {name!r}, which is no path below it")
