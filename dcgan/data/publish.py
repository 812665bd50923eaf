"""Publishes the shards in a working directory as an image store, named by the hash of its manifest."""

import hashlib
import logging
import os
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from dcgan import storage
from dcgan.data.store import Description, SourceFile, Store

log = logging.getLogger(__name__)
UNPUBLISHED = "store"  # in a working directory: what will be renamed into `stores`


class _Hashed:
    """A file that is hashed as it is written, so that a shard need not be read back for its hash."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes | memoryview) -> int:
        self.hash.update(content)
        self.bytes += memoryview(content).nbytes
        return self.file.write(content)


def write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write an .npy file aside and rename it into place; returns its length and hash. `finish` flushes it to disk."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with aside.open("wb") as file:
            hashed = _Hashed(file)
            np.lib.format.write_array_header_1_0(hashed, np.lib.format.header_data_from_array_1_0(array))
            hashed.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return {"bytes": hashed.bytes, "sha256": hashed.hash.hexdigest()}


def finish(
    home: Path,
    directory: Path,
    description: Description,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    sources: Sequence[SourceFile],
    duplicates_removed: int = 0,
) -> str:
    """Publish the shards in a working directory as a store and return its fingerprint; `directory` is removed.

    A report in it, such as `duplicates`, goes to `home`/duplicates/<fingerprint>.

    splits: for each split, in the order to store, the records of its shards, as `shards.make` returns them.
    An existing store with this fingerprint is kept, unless it is damaged: then it is replaced.
    Raises ValueError if a split is empty.
    """
    staged = directory / UNPUBLISHED
    known = {}
    for name, records in splits.items():
        labels = np.array([label for record in records for label in record["labels"]], np.int64)
        if not len(labels):
            raise ValueError(f"{description.dataset}: split {name!r} has no images")
        known[f"{name}-labels.npy"] = write_array(staged / f"{name}-labels.npy", labels)
        for number, record in enumerate(records):
            if not record["labels"]:  # all were skipped, or duplicates; an empty file can't be mapped
                continue
            known[f"{name}-{number:05d}.npy"] = {key: record[key] for key in ("bytes", "sha256")}
    manifest = {
        **asdict(description),
        "counts": {name: sum(len(record["labels"]) for record in records) for name, records in splits.items()},
        "pixels": {name: _totals(records) for name, records in splits.items()},
        "sources": [asdict(source) for source in sources],
        "skipped": [name for records in splits.values() for record in records for name, _ in record["skipped"]],
        "duplicates_removed": duplicates_removed,
        "files": known,
    }
    for file in known:
        storage.flush(staged / file)
    storage.write_json(staged / storage.MANIFEST, manifest)
    for path in staged.iterdir():
        if path.name not in {*known, storage.MANIFEST}:
            path.unlink()
    name = storage.fingerprint(staged)
    _remove_damaged(home, name)
    storage.publish(staged, home / "stores" / name)
    # Up to here a kill loses no shard, since the records are outside what is renamed. From here on the shards would be
    # made again: the report is moved after them, so that its groups still apply to them.
    for report in [path for path in directory.iterdir() if path.is_dir() and path != staged]:
        shutil.rmtree(home / report.name / name, ignore_errors=True)
        (home / report.name).mkdir(exist_ok=True)
        shutil.move(report, home / report.name / name)  # `stores` may be on another file system
    shutil.rmtree(directory)
    return name


def _totals(records: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Sum and sum of squares of each channel over a split."""
    return {key: [sum(channel) for channel in zip(*(r[key] for r in records), strict=True)] for key in _SUMS}


_SUMS = ("sums", "squares")


def _remove_damaged(home: Path, fingerprint: str) -> None:
    path = home / "stores" / fingerprint
    if not path.exists():
        return
    try:
        Store.open(home, fingerprint, verify=True)
    except storage.CorruptError as error:
        log.warning("replacing a damaged image store: %s", error)
        storage.discard(path)
