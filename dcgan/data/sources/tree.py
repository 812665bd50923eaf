"""A data set that is a tree of files: a directory, or everything below an s3:// address, staged into a directory.

A staged file has the length and the modification time of its object, by which the next staging recognises it; nothing
else is remembered of it. A kill at any moment loses no more than the pieces in flight.
"""

import hashlib
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial as bind
from pathlib import Path
from typing import Any, NamedTuple

from dcgan import storage
from dcgan.config import Data
from dcgan.data.sources import attempts, s3
from dcgan.data.sources.partial import GB, LOG_EVERY, locked, naming

log = logging.getLogger(__name__)


class Item(NamedTuple):
    """An object: its key, its path in the tree, its size in bytes and its modification time in nanoseconds."""

    key: str
    path: str
    size: int
    changed: int

    def is_at(self, path: Path) -> bool:
        """Whether `path` is this object, already staged."""
        try:
            seen = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return (seen.st_size, seen.st_mtime_ns) == (self.size, self.changed)


def tree(data: Data, folder: Path) -> Path:
    """The directory of `data.source`: itself or, if it is at s3://, a copy below `folder` that is brought up to date.

    The copy has the same relative paths; files that are no longer at the address are removed from it. Raises
    FileNotFoundError if there is no such directory, if nothing is at the address, or if the copy is incomplete and
    `data.offline` forbids completing it; ValueError for http(s) and for a key that is no path below the address;
    attempts.DownloadError if the address can't be read, and OSError, naming the path, if the copy can't be written.
    """
    source = data.source or ""
    if source.startswith("s3://"):
        return _staged(source.rstrip("/"), folder, data.offline)
    if source.startswith(("http://", "https://")):
        raise ValueError(
            f"data.source={attempts.shown(source)}: files can't be listed over http(s); give s3:// or a path"
        )
    root = Path(source).expanduser().absolute()
    if not source or not root.is_dir():
        raise FileNotFoundError(f"data.source={data.source} is not a directory")
    return root


def _staged(address: str, folder: Path, offline: bool) -> Path:
    name = f"{address.rpartition('/')[2]}-{hashlib.sha256(address.encode()).hexdigest()[:8]}"
    staging = Staging(address, folder / name)
    if offline:
        if staging.complete.exists() and staging.root.is_dir():
            return staging.root
        raise FileNotFoundError(
            f"{staging.root} is not complete, and data.offline=true: it must be a complete copy of {address}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / f".{name}.lock"):
        try:
            staging.run()
        except (attempts.Refused, attempts.Interrupted) as error:
            raise attempts.DownloadError(f"{address}: {error}", isinstance(error, attempts.Interrupted)) from error
    return staging.root


class Staging:
    """One run over all objects below `address`, into the directory `root`."""

    def __init__(self, address: str, root: Path) -> None:
        self.address, self.root = address, root
        self.complete = root.with_name(f".{root.name}.complete")
        self._aside = root.with_name(f".{root.name}.aside")  # outside the tree, where no key leads
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._fetched = self._bytes = 0

    def run(self) -> None:
        """Bring the tree up to date."""
        start = last = time.monotonic()
        log.info("%s: staging %s", self.root, self.address)
        self._aside.mkdir(exist_ok=True)  # what a kill left is resumed
        bucket, paths = s3.Bucket(self.address), set[str]()
        with ThreadPoolExecutor(s3.CONNECTIONS) as pool:
            try:
                for items in self._pages(bucket):
                    for item in pool.map(bind(self._stage, bucket), items):
                        paths.add(item.path)
                        if (now := time.monotonic()) - last > LOG_EVERY:
                            last = now
                            self._report(len(paths), now - start)
            finally:
                self._ended.set()
                pool.shutdown(cancel_futures=True)
        if not paths:
            raise FileNotFoundError(f"data.source={self.address} has no objects below it")
        self._remove_others(paths)
        shutil.rmtree(self._aside)
        storage.write_json(self.complete, {"address": self.address, "files": len(paths)})
        self._report(len(paths), time.monotonic() - start)

    def _pages(self, bucket: s3.Bucket) -> Iterator[list[Item]]:
        """All objects below the address, a page at a time: a tree may have millions."""
        prefix, after, first = f"{bucket.key}/" if bucket.key else "", None, True
        while first or after:
            found, after = attempts.persist(bind(bucket.page, prefix, after), self.root.name)
            yield [self._item(entry, prefix) for entry in found if not _is_marker(entry)]
            first = False

    def _item(self, entry: dict[str, Any], prefix: str) -> Item:
        key, path = entry["Key"], entry["Key"].removeprefix(prefix)
        if not storage.is_below(path):
            raise ValueError(f"data.source={self.address} has the key {key!r}, which is no path of a file below it")
        return Item(key, path, entry["Size"], round(entry["LastModified"].timestamp() * 1000) * 10**6)

    def _stage(self, bucket: s3.Bucket, item: Item) -> Item:
        path = self.root / item.path
        if not item.is_at(path):
            self.complete.unlink(missing_ok=True)
            aside = self._aside / hashlib.sha256(repr(item).encode()).hexdigest()
            attempts.persist(bind(self._copy, bucket, item, aside), item.path, lambda: _bytes(aside))
            os.utime(aside, ns=(item.changed, item.changed))
            path.parent.mkdir(parents=True, exist_ok=True)
            os.replace(aside, path)
            with self._lock:
                self._fetched += 1
                self._bytes += item.size
        return item

    def _copy(self, bucket: s3.Bucket, item: Item, aside: Path) -> None:
        """Fetch what `aside`, whose name tells the object's version, lacks of it."""
        with naming(aside), aside.open("ab") as file:
            for piece in bucket.pieces(item.key, _bytes(aside), item.size):
                if self._ended.is_set():  # by Ctrl-C or another object's failure: the rest may take hours
                    raise attempts.Refused("the staging has ended")
                file.write(piece)
        if (arrived := _bytes(aside)) != item.size:
            aside.unlink()  # the object is no longer the one that was listed
            raise attempts.Interrupted(f"{arrived} of {item.size} bytes received")

    def _remove_others(self, paths: set[str]) -> None:
        """Remove files, and then directories, that are no longer at the address: they would be trained on, or count."""
        for at, _, names in os.walk(self.root, topdown=False):
            for name in names:
                if (path := Path(at, name)).relative_to(self.root).as_posix() not in paths:
                    self.complete.unlink(missing_ok=True)
                    log.warning("%s is no longer at %s; removed", path, self.address)
                    path.unlink()
            if at != str(self.root):
                with suppress(OSError):  # it is not empty
                    os.rmdir(at)

    def _report(self, files: int, seconds: float) -> None:
        rate = self._bytes / 1e6 / max(seconds, 1e-3)
        log.info(
            "%s: %d files are there, %d fetched, %.2f GB, %.1f MB/s",
            self.root, files, self._fetched, self._bytes / GB, rate,
        )  # fmt: skip


def _is_marker(entry: dict[str, Any]) -> bool:
    """Whether an object is a console's placeholder for an empty directory."""
    return entry["Key"].endswith("/") and entry["Size"] == 0


def _bytes(file: Path) -> int:
    """A file's length; 0 if it is not there."""
    return file.stat().st_size if file.exists() else 0
