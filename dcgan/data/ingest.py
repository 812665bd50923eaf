"""Turns a data set's own files into an image store, once: unchanged input is recognised without being read.

Shards are made in any order, by local threads or by Ray on all available processors, in a working directory named after
the input. After a kill at any moment, the same command resumes from the complete shards, and the result is the same,
byte for byte, whoever made them.
"""

import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcgan import environment, storage
from dcgan.config import Data
from dcgan.data import publish, shards, store
from dcgan.data.decode import TRANSFORM
from dcgan.data.shards import Job
from dcgan.data.sources import SOURCES
from dcgan.data.sources.base import Opened
from dcgan.experiment import PLACES

log = logging.getLogger(__name__)

LOG_EVERY = 5  # seconds
MANY = 16  # from this many shards to decode, more processes are worth the ten seconds that Ray takes to start
Maker = Callable[[Callable[[Job], dict[str, Any]], Sequence[Job]], Iterator[dict[str, Any]]]


def by_threads(make: Callable[[Job], dict[str, Any]], jobs: Sequence[Job]) -> Iterator[dict[str, Any]]:
    """The results of `make`, in any order, from as many threads as there are processors; the first error stops all.

    Pillow decodes without the interpreter's lock. Memory: one shard per thread.
    """
    with ThreadPoolExecutor(environment.cpus()) as pool:
        try:
            yield from pool.map(make, jobs)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def ingest(data: Data, home: Path, verify: bool = False, maker: Maker = by_threads) -> str:
    """Publish the images under `home/stores` and return the store's fingerprint.

    `home/stores/index` records which input gave which store. Input that is unchanged, by the settings and the source's
    own cheap signature, returns at once if its store is there with the right lengths (the right bytes, with `verify`);
    a missing or damaged store is made again. Downloads go to `home/downloads`. `maker` runs the jobs if MANY or more
    shards are to be decoded. Raises what `base.Source` says, ValueError for an image that can't be used (there is no
    store then, and the complete shards serve the next attempt), and BusyError if another process is ingesting the same
    input.
    """
    source = SOURCES[data.name]
    settings = data.model_dump(mode="json", exclude=PLACES)
    given = {
        "settings": settings,
        "signature": source.signature(data),
        "transform": [TRANSFORM, shards.BYTES],
    }
    key = _digest(given)
    index = home / "stores" / "index" / f"{key}.json"
    if data.remote:
        _copy_known(data, home, key, index)
    if fingerprint := _known(index, home, verify):
        if data.remote:
            _copy(data.remote, home, fingerprint, key, index)
        return fingerprint
    given["settings"] = {name: value for name, value in settings.items() if name != "unreadable"}  # shards serve both
    with _working(home, _digest(given)) as directory:
        opened = source.read(data, home / "downloads")
        fingerprint = assemble(
            opened, home, directory, maker, skip=data.unreadable == "skip", deduplicate=data.deduplicate
        )
    storage.write_json(index, {"fingerprint": fingerprint})
    log.info("%s: image store %s", data.name, fingerprint)
    if data.remote:
        _copy(data.remote, home, fingerprint, key, index)
    return fingerprint


def _digest(value: Any) -> str:
    return storage.digest(storage.dump_json(value).encode())


def _copy_known(data: Data, home: Path, key: str, index: Path) -> None:
    """Copy the store that this input gave, here or elsewhere, from the remote if only the remote has it."""
    from dcgan import mirror_stores

    assert data.remote is not None
    fingerprint = _recorded(index) or mirror_stores.read_index(data.remote, key)
    # In use from here on: verifying it may take minutes, in which another process may look for room.
    if fingerprint and mirror_stores.used_or_copied(home, data.remote, fingerprint, data.cache_gb):
        storage.write_json(index, {"fingerprint": fingerprint})


def _copy(remote: str, home: Path, fingerprint: str, key: str, index: Path) -> None:
    from dcgan import mirror_stores

    mirror_stores.use(home / "stores" / fingerprint)  # once it is at the remote, it may be removed here
    mirror_stores.push_store(home, remote, fingerprint)
    mirror_stores.write_index(remote, key, index)


def _known(index: Path, home: Path, verify: bool) -> str | None:
    """The fingerprint of the store that this input gave before, if that store is sound."""
    fingerprint = _recorded(index)
    if fingerprint is None:
        return None
    try:
        return store.Store.open(home, fingerprint, verify).fingerprint
    except (FileNotFoundError, storage.CorruptError) as error:
        log.warning("ingesting again: %s", error)
        return None


def _recorded(index: Path) -> str | None:
    if not index.exists():
        return None
    try:
        return str(json.loads(index.read_bytes())["fingerprint"])
    except (ValueError, KeyError, TypeError) as error:
        log.warning("ingesting again: %s is damaged: %s", index, error)
        return None


@contextmanager
def _working(home: Path, key: str) -> Iterator[Path]:
    """The directory in which this input's shards are made: survives a kill or an error, unless it has no shards."""
    directory = home / "stores" / f".ingest-{key}"
    (index := home / "stores" / "index").mkdir(parents=True, exist_ok=True)
    with storage.hold(index / f"{key}.lock", str(directory)):
        directory.mkdir(exist_ok=True)
        try:
            yield directory
        finally:
            if directory.exists() and not list(directory.glob("*-[0-9]*.json")):
                shutil.rmtree(directory, ignore_errors=True)


def assemble(
    opened: Opened,
    home: Path,
    directory: Path,
    maker: Maker = by_threads,
    skip: bool = False,
    deduplicate: bool = False,
    shard_images: int | None = None,
) -> str:
    """Make every shard that `directory` lacks, publish all as a store under `home`, and return its fingerprint.

    skip: leave out images that can't be decoded. deduplicate: keep one of each group of training images that are nearly
    the same. shard_images: images per shard, by default `shards.images_per_shard`.
    """
    about = opened.description
    images = shard_images or shards.images_per_shard(about.channels, about.size)
    (directory / publish.UNPUBLISHED).mkdir(exist_ok=True)
    for half_written in (directory / publish.UNPUBLISHED).glob(".*"):
        half_written.unlink(missing_ok=True)  # Ray's actors outlive a driver by seconds
    jobs = list(_jobs(opened, directory, images, skip))
    _require_space(directory, opened)
    missing = [job for job in jobs if not shards.made(job)]
    if len(missing) < len(jobs):
        log.info("%s: %d of %d shards were made before", about.dataset, len(jobs) - len(missing), len(jobs))
    if not skip:
        _refuse_skipped([job for job in jobs if job not in missing])
    many = len([job for job in missing if job.records.encoded]) >= MANY
    for _ in _logged(about.dataset, missing, (maker if many else by_threads)(shards.make, missing)):
        pass
    removed = 0
    if deduplicate:
        from dcgan.data import pruning  # torch

        removed = pruning.prune(directory, [job for job in jobs if job.split in about.training])
    splits = {name: [shards.read(job) for job in jobs if job.split == name] for name in opened.splits}
    for name, reason in [pair for records in splits.values() for record in records for pair in record["skipped"]]:
        log.warning("%s skipped: %s", name, reason)
    return publish.finish(home, directory, about, splits, opened.sources, removed)


def _refuse_skipped(made: Iterable[Job]) -> None:
    """Raise ValueError for an image that an attempt which skipped such images has left out of a shard."""
    for job in made:
        for name, reason in shards.read(job)["skipped"]:
            raise ValueError(f"{name} can't be decoded ({reason}): {shards.ADVICE}")


def _jobs(opened: Opened, directory: Path, shard_images: int, skip: bool) -> Iterator[Job]:
    about = opened.description
    for split, records in opened.splits.items():
        for number in range(math.ceil(len(records) / shard_images)):
            part = records.part(number * shard_images, min((number + 1) * shard_images, len(records)))
            yield Job(directory, split, number, part, about.size, about.channels, len(about.classes), skip)


def _require_space(directory: Path, opened: Opened) -> None:
    """Raise OSError before any work if the file system can't hold the store."""
    about = opened.description
    needed = sum(map(len, opened.splits.values())) * about.channels * about.size**2
    there = sum(file.stat().st_size for file in (directory / publish.UNPUBLISHED).iterdir())
    free = shutil.disk_usage(directory).free
    if needed - there > free:
        raise OSError(
            f"{directory.parent}: {needed / 1e9:.1f} GB of images are to be written, {free / 1e9:.1f} GB are free"
        )


def _logged(name: str, jobs: Sequence[Job], made: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """`made`, with a line in the log every few seconds, and an estimate of the time left."""
    total = sum(len(job.records) for job in jobs)
    start = last = time.monotonic()
    done = 0
    for record in made:
        done += len(record["labels"]) + len(record["skipped"])
        if (now := time.monotonic()) - last > LOG_EVERY:
            last, left = now, (now - start) / done * (total - done)
            log.info("%s: %d of %d images, %.0f s left", name, done, total, left)
        yield record
    if total:
        log.info("%s: %d images in %.0f s", name, total, time.monotonic() - start)
