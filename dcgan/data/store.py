"""The image store: uint8 shards, labels and a manifest, named by the manifest's own hash."""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dcgan import storage

log = logging.getLogger(__name__)

SHARD_IMAGES = 65_536  # 192 MiB at 32 px RGB, 768 MiB at 64 px: few files, and one still fits in memory


@dataclass(frozen=True)
class SourceFile:
    """One file that a data set came from; for a tree of images, the whole tree as one entry."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Description:
    """What a store holds, before its images are known.

    classes: names by label, empty where images have no label. size: pixels a side. channels: 1 or 3.
    transform: in words, how a source image became a stored one.
    """

    dataset: str
    classes: tuple[str, ...]
    size: int
    channels: int
    transform: str


def write(
    home: Path,
    description: Description,
    splits: Iterable[tuple[str, Iterable[tuple[np.ndarray, int]]]],
    sources: Iterable[SourceFile],
    skipped: Iterable[str] = (),
    shard_images: int = SHARD_IMAGES,
) -> str:
    """Write a store under `home/stores` and return its fingerprint; nothing appears there if anything fails.

    A store of this fingerprint that is already there stays, unless it is damaged: then it is replaced.

    splits: (name, iterator of (uint8 image (C, H, W), label)) in the order to write; label -1 means none.
    skipped: names of input that was left out. `sources` and `skipped` are read after the splits.
    Raises ValueError if an image has another shape or dtype than described, a label is unknown, or a split is empty.
    """
    stores = home / "stores"
    with storage.staging(stores) as staged:
        counts = {name: _write_split(staged, name, images, description, shard_images) for name, images in splits}
        manifest = {
            **asdict(description),
            "counts": counts,
            "sources": [asdict(source) for source in sources],
            "skipped": list(skipped),
            "duplicates_removed": 0,
        }
        storage.seal(staged, manifest)
        name = storage.fingerprint(staged)
        _remove_damaged(home, name)
        storage.publish(staged, stores / name)
    return name


def _remove_damaged(home: Path, fingerprint: str) -> None:
    path = home / "stores" / fingerprint
    if not path.exists():
        return
    try:
        Store.open(home, fingerprint, verify=True)
    except storage.CorruptError as error:
        log.warning("replacing a damaged image store: %s", error)
        storage.discard(path)


def _write_split(
    staged: Path, name: str, images: Iterable[tuple[np.ndarray, int]], description: Description, shard_images: int
) -> int:
    labels: list[int] = []
    for number, shard in enumerate(_shards(name, images, description, labels, shard_images)):
        np.save(staged / f"{name}-{number:05d}.npy", shard)
    if not labels:
        raise ValueError(f"{description.dataset}: split {name!r} has no images")
    np.save(staged / f"{name}-labels.npy", np.array(labels, np.int64))
    return len(labels)


def _shards(
    name: str, images: Iterable[tuple[np.ndarray, int]], description: Description, labels: list[int], shard_images: int
) -> Iterator[np.ndarray]:
    shape = (description.channels, description.size, description.size)
    allowed = range(len(description.classes)) if description.classes else range(-1, 0)
    pending: list[np.ndarray] = []
    for image, label in images:
        where = f"{description.dataset}: image {len(labels)} of split {name!r}"
        if image.shape != shape or image.dtype != np.uint8:
            raise ValueError(f"{where} is {image.dtype} {image.shape}; expected uint8 {shape}")
        if label not in allowed:
            raise ValueError(f"{where} has label {label}; allowed are {allowed.start} to {allowed.stop - 1}")
        pending.append(image)
        labels.append(label)
        if len(pending) == shard_images:
            yield np.stack(pending)
            pending.clear()
    if pending:
        yield np.stack(pending)


@dataclass(frozen=True)
class Store:
    """A published image store, read through memory maps.

    Raises CorruptError when opened with `verify` and a byte differs from the manifest; lengths are always checked.
    """

    path: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, home: Path, fingerprint: str, verify: bool = False) -> "Store":
        path = home / "stores" / fingerprint
        if not path.is_dir():
            raise FileNotFoundError(f"no image store {fingerprint} under {home / 'stores'}: run `dcgan ingest` first")
        manifest = path / storage.MANIFEST
        if manifest.is_file() and storage.fingerprint(path) != fingerprint:
            raise storage.CorruptError(f"{manifest} is corrupt: its hash is not the store's name")
        return cls(path, storage.read_manifest(path, hashes=verify))

    @property
    def fingerprint(self) -> str:
        return self.path.name

    @property
    def dataset(self) -> str:
        return self.manifest["dataset"]

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by label; empty if the images have no labels."""
        return tuple(self.manifest["classes"])

    @property
    def size(self) -> int:
        """Pixels a side."""
        return self.manifest["size"]

    @property
    def channels(self) -> int:
        return self.manifest["channels"]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.manifest["counts"])

    def count(self, split: str) -> int:
        return self.manifest["counts"][split]

    def shards(self, split: str) -> list[np.ndarray]:
        """Memory maps of the split's shards in order, each uint8 (n, C, H, W)."""
        shard = re.compile(re.escape(split) + r"-\d{5}\.npy")
        names = sorted(name for name in self.manifest["files"] if shard.fullmatch(name))
        return [np.load(self.path / name, mmap_mode="r") for name in names]

    def images(self, split: str) -> np.ndarray:
        """The split's images, uint8 (N, C, H, W): a memory map of the one shard, or all shards read into memory."""
        shards = self.shards(split)
        return shards[0] if len(shards) == 1 else np.concatenate(shards)

    def labels(self, split: str) -> np.ndarray:
        """int64 (N,); -1 everywhere if the images have no labels."""
        return np.load(self.path / f"{split}-labels.npy")
