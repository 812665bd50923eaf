"""Copies image stores to and from `data.remote`, an s3:// address; the home is a cache of those used here.

<remote>/stores/<fingerprint>/      a store is there once its manifest is
<remote>/stores/index/<key>.json    which input gave which store
"""

import fcntl
import json
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dcgan import mirror, storage
from dcgan.remote import Remote

log = logging.getLogger(__name__)

_used: dict[Path, int] = {}  # stores used by this process, each with the descriptor that holds its lock


def push_store(home: Path, url: str, fingerprint: str) -> None:
    """Copy a store to the remote, whole or not at all; an interrupted copy is resumed.

    Raises RemoteError; the store does not count as being there then.
    """
    remote, at = Remote(url), f"stores/{fingerprint}"
    # It is named by its content: a file of the right length is the right one.
    mirror.push(remote, home / at, at, remote.sizes(at))


def pull_store(home: Path, url: str, fingerprint: str, cache_gb: float) -> bool:
    """Copy a store from the remote into the home, file by file, each verified; False if it is not there.

    An interrupted copy is resumed. If all stores would exceed `cache_gb`, those that the remote also has and that are
    not in use are removed first, the longest unused before others. Raises RemoteError, CorruptError, or OSError if
    there still is no room.
    """
    remote, stores = Remote(url), home / "stores"
    lock = stores / "index" / f"{fingerprint}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with storage.hold(lock, fingerprint, patience=math.inf):
        return (stores / fingerprint).exists() or _pull_store(remote, stores, fingerprint, cache_gb)


def _pull_store(remote: Remote, stores: Path, fingerprint: str, cache_gb: float) -> bool:
    manifest = remote.read(f"stores/{fingerprint}/{storage.MANIFEST}")
    if manifest is None:
        return False
    if storage.digest(manifest) != fingerprint:
        raise storage.CorruptError(
            f"{remote.url}/stores/{fingerprint}/{storage.MANIFEST} is corrupt: its hash is not its name"
        )
    _make_room(remote, stores, sum(entry["bytes"] for entry in json.loads(manifest)["files"].values()), cache_gb)
    try:
        mirror.pull(remote, f"stores/{fingerprint}", stores / fingerprint, manifest)
    except storage.CorruptError as error:
        raise storage.CorruptError(f"{error}; without {remote.url}/stores/{fingerprint}/ it is made again") from error
    return True


def use(store: Path) -> bool:
    """Record that a store is used now, and keep this host's processes from removing it until this one ends.

    False if it is not there, perhaps because another process removed it a moment ago.
    """
    with ExitStack() as stack:
        try:
            descriptor = os.open(store / storage.MANIFEST, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_SH)  # waits for a removal
            if not os.path.samestat(os.fstat(descriptor), (store / storage.MANIFEST).stat()):
                return False
            now = time.time_ns()  # finer than the kernel's own clock for files, which ticks every few milliseconds
            os.utime(store, ns=(now, now))
        except FileNotFoundError:
            return False
        stack.pop_all()
    if (earlier := _used.pop(store, None)) is not None:  # perhaps of a store that was replaced
        os.close(earlier)
    _used[store] = descriptor
    return True


def used_or_copied(home: Path, url: str, fingerprint: str, cache_gb: float) -> bool:
    """Use a store, copied from the remote first if it is not here; False if neither has it, or it is damaged here.

    Raises as `pull_store` does.
    """
    path = home / "stores" / fingerprint
    while not use(path):
        if path.exists() or not pull_store(home, url, fingerprint, cache_gb):
            return False
    return True


@contextmanager
def _alone(store: Path) -> Iterator[bool]:
    """Whether no other process of this host uses the store; none begins to while the body runs."""
    with ExitStack() as stack:
        alone = False
        with suppress(BlockingIOError, PermissionError, FileNotFoundError):  # used, of another user, removed
            # NFS locks for one alone only what may be written.
            manifest = stack.enter_context((store / storage.MANIFEST).open("r+"))
            fcntl.flock(manifest, fcntl.LOCK_EX | fcntl.LOCK_NB)
            alone = os.path.samestat(os.fstat(manifest.fileno()), (store / storage.MANIFEST).stat())
        yield alone


def _make_room(remote: Remote, stores: Path, needed: int, cache_gb: float) -> None:
    limit = cache_gb * 1e9
    if needed > limit:
        raise OSError(f"data.cache_gb={cache_gb:g} is too little for a store of {needed / 1e9:.2f} GB")
    with storage.hold(stores / "index" / "room.lock", str(stores), patience=math.inf):  # one process removes at a time
        there = sorted(
            (path.parent for path in stores.glob(f"{16 * '[0-9a-f]'}/{storage.MANIFEST}")),
            key=lambda path: path.stat().st_mtime,
        )
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in there}
        for path in there:
            if sum(sizes.values()) + needed <= limit:
                return
            if _remove_copy(remote, path):
                sizes.pop(path)
    if sum(sizes.values()) + needed > limit:
        raise OSError(
            f"{stores} holds {sum(sizes.values()) / 1e9:.2f} GB of image stores that are in use, or that {remote.url} "
            f"does not have; with {needed / 1e9:.2f} GB more that is over data.cache_gb={cache_gb:g}"
        )


def _remove_copy(remote: Remote, store: Path) -> bool:
    """Remove a store if no process uses it and the remote has the same; False if not."""
    with _alone(store) as alone:
        if not alone:
            return False
        if remote.read(f"stores/{store.name}/{storage.MANIFEST}") != (store / storage.MANIFEST).read_bytes():
            return False
        log.info("removing the copy of image store %s to make room: %s keeps it", store.name, remote.url)
        storage.discard(store)
        return True


def read_index(url: str, key: str) -> str | None:
    """The fingerprint of the store that an input gave, wherever it was ingested; None if it is not known there.

    Raises CorruptError for what is no fingerprint: whoever writes to the remote chooses it, and it becomes a path.
    """
    content = Remote(url).read(f"stores/index/{key}.json")
    if content is None:
        return None
    try:
        fingerprint = str(json.loads(content)["fingerprint"])
    except (ValueError, KeyError, TypeError):
        fingerprint = ""
    if not re.fullmatch("[0-9a-f]{16}", fingerprint):
        raise storage.CorruptError(f"{url}/stores/index/{key}.json names no image store; without it, it is made again")
    return fingerprint


def write_index(url: str, key: str, index: Path) -> None:
    """Tell the remote which store an input gave, unless it knows; called after the store is there."""
    remote, name = Remote(url), f"stores/index/{key}.json"
    if remote.read(name) != index.read_bytes():
        remote.write(name, index.read_bytes())
