"""Where the images of a split are: a list that is cheap to cut and to send to another process, in a fixed order.

`part` cuts it; iterating reads the images, one at a time. Nothing here decodes: `shards.py` does.
"""

import hashlib
import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

LARGEST = 2**28  # bytes of one image file inside an archive, unpacked: the largest of ImageNet has 15 MB


class Item(NamedTuple):
    """One image as it lies in its source.

    image: the bytes of an image file, or pixels, uint8 (H, W) or (H, W, 3). label: -1 where there is none.
    name: within the data set, the same wherever that lies. where: what a refusal calls it.
    """

    name: str
    image: bytes | np.ndarray
    label: int
    where: str


class Records(Protocol):
    """The images of a split, in order.

    encoded: whether they are image files, which take a processor each to decode, rather than pixels.
    exif: whether image files are turned as their EXIF orientation says.
    """

    @property
    def encoded(self) -> bool: ...

    @property
    def exif(self) -> bool: ...

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> "Records":
        """Those from `start` up to `stop` alone."""

    def __iter__(self) -> Iterator[Item]:
        """Raises OSError, naming the file, if one is gone, and ValueError if one is not what it was."""


@dataclass(frozen=True)
class Pixels:
    """Images in memory or in a memory map: uint8 (N, H, W) or (N, H, W, 3), and int64 labels (N,) or None."""

    images: np.ndarray
    labels: np.ndarray | None
    first: int = 0
    encoded: bool = False
    exif: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> "Pixels":
        labels = None if self.labels is None else self.labels[start:stop]
        return Pixels(self.images[start:stop], labels, self.first + start)

    def __iter__(self) -> Iterator[Item]:
        for i, image in enumerate(self.images):
            name = f"image {self.first + i}"
            yield Item(name, image, -1 if self.labels is None else int(self.labels[i]), name)


class Entry(NamedTuple):
    """An image file on disk, or one inside an archive.

    label: -1 where there is none. offset, length: where its bytes are in `path`; length -1 is the whole file.
    deflated: they are a raw deflate stream, as in a zip file. sha256: what the bytes have to hash to, if not empty.
    """

    name: str
    path: Path
    label: int
    offset: int = 0
    length: int = -1
    deflated: bool = False
    sha256: bytes = b""


@dataclass(frozen=True)
class Files:
    """Image files, each whole or a stretch of an archive."""

    entries: Sequence[Entry]
    exif: bool = False
    encoded: bool = True

    def __len__(self) -> int:
        return len(self.entries)

    def part(self, start: int, stop: int) -> "Files":
        return replace(self, entries=self.entries[start:stop])

    def __iter__(self) -> Iterator[Item]:
        for entry in self.entries:
            where = f"{entry.path}: {entry.name}" if entry.length >= 0 else str(entry.path)
            yield Item(entry.name, _read(entry), entry.label, where)


def _read(entry: Entry) -> bytes:
    with open(entry.path, "rb", buffering=0) as file:  # read whole: a buffer would only copy it
        if entry.offset:
            file.seek(entry.offset)
        raw = file.read(entry.length)
    if entry.length not in (-1, len(raw)):
        raise ValueError(f"{entry.path} ends inside {entry.name}: it has been cut short")
    if entry.deflated:
        raw = _inflate(raw, entry)
    if entry.sha256 and hashlib.sha256(raw).digest() != entry.sha256:
        raise ValueError(f"{entry.path} changed while it was being read")
    return raw


def _inflate(raw: bytes, entry: Entry) -> bytes:
    stream = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = stream.decompress(raw, LARGEST)
    except zlib.error as error:
        raise ValueError(f"{entry.path}: {entry.name} is damaged: {error}") from error
    if not stream.eof:
        raise ValueError(f"{entry.path}: {entry.name} is cut short, or more than {LARGEST >> 20} MiB unpacked")
    return content


@dataclass(frozen=True)
class Tree:
    """Whole image files below a directory, each known by its hash: 150 bytes of memory an image.

    names: relative to `root`, with slashes. labels: int64 (N,). hashes: SHA-256 of each file, uint8 (N, 32).
    """

    root: Path
    names: Sequence[str]
    labels: np.ndarray
    hashes: np.ndarray
    exif: bool = True
    encoded: bool = True

    def __len__(self) -> int:
        return len(self.names)

    def part(self, start: int, stop: int) -> "Tree":
        some = slice(start, stop)
        return replace(self, names=self.names[some], labels=self.labels[some], hashes=self.hashes[some])

    def where(self, chosen: np.ndarray) -> "Tree":
        """Those for which bool (N,) `chosen` is true."""
        names = list(itertools.compress(self.names, chosen))
        return replace(self, names=names, labels=self.labels[chosen], hashes=self.hashes[chosen])

    def __iter__(self) -> Iterator[Item]:
        for name, label, sha256 in zip(self.names, self.labels.tolist(), self.hashes, strict=True):
            where = f"{self.root}/{name}"
            with open(where, "rb", buffering=0) as file:
                raw = file.read()
            if hashlib.sha256(raw).digest() != sha256.tobytes():
                raise ValueError(f"{where} changed while it was being read")
            yield Item(name, raw, label, where)
