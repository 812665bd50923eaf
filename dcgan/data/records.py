"""Where the images of a split are: a list in a fixed order that is cheap to slice and to send to another process.

`part` slices it; iterating reads the images, one at a time. Nothing here decodes: `shards.py` does.
"""

import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

T = TypeVar("T")

LARGEST = 2**28  # bytes of one image file inside an archive, unpacked: the largest of ImageNet has 15 MB
PACKED = 256  # names per block of a tree: larger ones pack no tighter, and even a shard's part unpacks whole blocks
PREFIX = 8  # bytes of a SHA-256 that tell whether a file has changed


class Item(NamedTuple):
    """One image as its source has it.

    image: the bytes of an image file, or pixels, uint8 (H, W) or (H, W, 3). label: -1 where there is none.
    name: within the data set, the same wherever that is. where: what error messages call it.
    """

    name: str
    image: bytes | np.ndarray
    label: int
    where: str


class Records(Protocol):
    """The images of a split, in order.

    encoded: whether they are image files, each of which keeps a processor busy decoding, rather than pixels.
    exif: whether the EXIF orientation of image files is applied.
    """

    @property
    def encoded(self) -> bool: ...

    @property
    def exif(self) -> bool: ...

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> "Records":
        """Only those from `start` up to `stop`."""

    def __iter__(self) -> Iterator[Item]:
        """Raises OSError, naming the file, if one is missing, and ValueError if one has changed."""


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
    deflated: they are a raw deflate stream, as in a zip file. sha256: what the bytes must hash to, if not empty.
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
    """Image files, each a whole file or a byte range of an archive."""

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


class Block(NamedTuple):
    """Up to PACKED files: their names, as `pack` gives them, and the first PREFIX bytes of the SHA-256 of each."""

    names: bytes
    hashes: bytes

    def files(self) -> Iterator[tuple[str, bytes]]:
        hashes = (self.hashes[i : i + PREFIX] for i in range(0, len(self.hashes), PREFIX))
        return zip(unpack(self.names), hashes, strict=True)


def pack(names: Iterable[str]) -> bytes:
    """Pack file names, at least one, into a few bytes each where they resemble one another."""
    return zlib.compress(b"\0".join(map(os.fsencode, names)))


def unpack(names: bytes) -> list[str]:
    return [os.fsdecode(name) for name in zlib.decompress(names).split(b"\0")]


@dataclass(frozen=True)
class Tree:
    """Whole image files below a directory, each identified by its hash: a dozen bytes of memory per image.

    numbers: the label of the images below each directory of `root`; -1 elsewhere. The images are those of `blocks`, of
    PACKED files each except the last, from `start` up to `stop`. Names are relative to `root`, with slashes.
    """

    root: Path
    numbers: Mapping[str, int]
    blocks: Sequence[Block]
    start: int
    stop: int
    exif: bool = True
    encoded: bool = True

    @classmethod
    def of(cls, root: Path, numbers: Mapping[str, int], blocks: Sequence[Block]) -> "Tree":
        """All images of the blocks."""
        return cls(root, numbers, blocks, 0, sum(len(block.hashes) for block in blocks) // PREFIX)

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Tree":
        start, stop = self.start + start, self.start + stop
        first = start // PACKED
        blocks, before = self.blocks[first : math.ceil(stop / PACKED)], first * PACKED
        return replace(self, blocks=blocks, start=start - before, stop=stop - before)

    def where(self, chosen: Callable[[bytes], bool]) -> "Tree":
        """Those for which `chosen` accepts the first bytes of the hash."""
        files = (file for file in self._files() if chosen(file[1]))
        blocks = [
            Block(pack(name for name, _ in some), b"".join(sha256 for _, sha256 in some))
            for some in batched(files, PACKED)
        ]
        return Tree.of(self.root, self.numbers, blocks)

    def _files(self) -> Iterator[tuple[str, bytes]]:
        files = itertools.chain.from_iterable(block.files() for block in self.blocks)
        return itertools.islice(files, self.start, self.stop)

    def __iter__(self) -> Iterator[Item]:
        for name, sha256 in self._files():
            where = f"{self.root}/{name}"
            with open(where, "rb", buffering=0) as file:
                raw = file.read()
            if not hashlib.sha256(raw).digest().startswith(sha256):
                raise ValueError(f"{where} changed while it was being read")
            yield Item(name, raw, self.numbers.get(name.partition("/")[0], -1), where)


def batched(items: Iterable[T], count: int) -> Iterator[tuple[T, ...]]:
    """`count` items at a time, and the rest at the end; itertools has it from Python 3.12 on."""
    rest = iter(items)
    return iter(lambda: tuple(itertools.islice(rest, count)), ())
