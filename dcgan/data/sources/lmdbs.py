"""Locates image files in an LMDB, to be read in place: its tree is walked once, like an archive's directory.

The LMDB library is not used. It maps the file into memory and trusts what is in it: reading beyond the end of a file
that was cut short, or a file whose last pages never arrived, kills the process (SIGBUS, SIGABRT). Here a damaged file
is rejected with an error that names it, no lock file is needed, and any number of threads and processes may read.

The format is that of LMDB 0.9 on 64-bit little-endian machines, which LSUN was published in (`MDB_page`, `MDB_meta`,
`MDB_node` in its mdb.c): pages of one size; a tree whose leaves hold keys and small values; larger values in
consecutive pages of their own.
"""

import os
import struct
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcgan import storage
from dcgan.data.records import Item

FILE = "data.mdb"  # in the directory that is an LMDB; lock.mdb beside it is not needed
PAGE = struct.Struct("<Q2xHH2x")  # number, flags, end of the list of nodes
NODE = struct.Struct("<HHHH")  # 32 bits of size or page number, flags (of a branch: 16 more bits), length of the key
NUMBER = struct.Struct("<Q")
# Page header; magic number, version; of the free pages' tree the page size alone; of the images' tree flags, depth,
# number of keys, root; last page; transaction.
META = struct.Struct("<8x2xH4x II16x I44x 4xHH24xQQ QQ")
MAGIC, VERSION = 0xBEEFC0DE, 1
BRANCH, LEAF, META_PAGE = 1, 2, 8  # a page's flags
ELSEWHERE = 1  # a node's flag: the value is in pages of its own; other flags are for trees of duplicates
EMPTY = 2**64 - 1  # the root of a tree without pages
DEEPEST = 32  # levels of a tree; LMDB's own limit


class Header(NamedTuple):
    """What a header page says: bytes per page; the tree's flags, depth, number of keys and root; last page; age."""

    page: int
    flags: int
    depth: int
    keys: int
    root: int
    last: int
    transaction: int


@dataclass(frozen=True, eq=False)
class Images:
    """Images in an LMDB, JPEG or WebP, in key order: keys as bytes (N,), and their places in the file, int64 (N,)."""

    file: Path
    keys: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray
    encoded: bool = True
    exif: bool = False

    def __len__(self) -> int:
        return len(self.keys)

    def part(self, start: int, stop: int) -> "Images":
        return Images(self.file, self.keys[start:stop], self.offsets[start:stop], self.lengths[start:stop])

    def __iter__(self) -> Iterator[Item]:
        with self.file.open("rb") as file:
            for key, offset, length in zip(self.keys, self.offsets.tolist(), self.lengths.tolist(), strict=True):
                name = key.decode("ascii", "backslashreplace")
                where = f"{self.file}: {name}"
                if len(image := os.pread(file.fileno(), length, offset)) < length:
                    raise ValueError(f"{where} is cut short")
                yield Item(name, image, -1, where)


def images(path: Path) -> Images:
    """All images in an LMDB's file; raises CorruptError, naming it, if it is not one, is damaged or cut short."""
    with path.open("rb") as file:
        tree = Tree(path, file.fileno())
        keys, offsets, lengths = [], array("q"), array("q")
        for key, offset, length in islice(tree, tree.header.keys + 1):  # a damaged tree may have no end
            keys.append(key)
            offsets.append(offset)
            lengths.append(length)
    if len(keys) != tree.header.keys:
        more = "more" if len(keys) > tree.header.keys else "fewer"
        raise storage.CorruptError(f"{path} is damaged: it has {more} keys than the {tree.header.keys} that it says")
    return Images(path, np.array(keys, np.bytes_), np.array(offsets, np.int64), np.array(lengths, np.int64))


class Tree:
    """The keys of an LMDB, in order, each with the offset and the length of its value in the file."""

    def __init__(self, path: Path, file: int) -> None:
        self.path, self.file = path, file
        self.size = os.fstat(file).st_size
        first = self._header(0)
        self.header = max(first, self._header(first.page), key=lambda header: header.transaction)
        if self.size < (needed := (self.header.last + 1) * self.header.page):
            raise storage.CorruptError(f"{path} has {self.size} bytes and needs {needed}: it has been cut short")
        if self.header.flags or self.header.depth > DEEPEST:
            raise self._damaged(f"its tree has flags {self.header.flags} and depth {self.header.depth}")

    def __iter__(self) -> Iterator[tuple[bytes, int, int]]:
        if self.header.root != EMPTY:
            for leaf in self._leaves(self.header.root, self.header.depth):
                yield from self._values(leaf)

    def _header(self, offset: int) -> Header:
        raw = os.pread(self.file, META.size, offset)
        if len(raw) == META.size:
            flags, magic, version, *rest = META.unpack(raw)
            header = Header(*rest)
            if flags & META_PAGE and (magic, version) == (MAGIC, VERSION) and 256 <= header.page <= 2**16:
                return header
        raise storage.CorruptError(f"{self.path} is no LMDB file of version {VERSION}, or it has been cut short")

    def _damaged(self, reason: str) -> storage.CorruptError:
        return storage.CorruptError(f"{self.path} is damaged: {reason}")

    def _leaves(self, number: int, depth: int) -> Iterator[int]:
        """The numbers of the leaf pages below a page with `depth` levels left."""
        if depth <= 1:
            yield number
            return
        page, nodes = self._nodes(number, BRANCH)
        for node in nodes:
            low, middle, high, _ = NODE.unpack_from(page, node)
            yield from self._leaves(low | middle << 16 | high << 32, depth - 1)

    def _nodes(self, number: int, kind: int) -> tuple[bytes, list[int]]:
        """A page and the offsets of its nodes, of which there is at least one."""
        if number > self.header.last:
            raise self._damaged(f"it has no page {number}")
        page = os.pread(self.file, self.header.page, number * self.header.page)
        itself, flags, end = PAGE.unpack_from(page)
        nodes = [*memoryview(page[PAGE.size : end]).cast("H")] if end % 2 == 0 else []
        if (itself, flags) != (number, kind) or not nodes or max(nodes) > len(page) - NODE.size:
            raise self._damaged(f"page {number} is not what its tree says")
        return page, nodes

    def _values(self, number: int) -> Iterator[tuple[bytes, int, int]]:
        page, nodes = self._nodes(number, LEAF)
        for node in nodes:
            low, high, flags, length = NODE.unpack_from(page, node)
            key = node + NODE.size
            value, size = key + length, low | high << 16
            offset = number * self.header.page + value
            if flags == ELSEWHERE and value + NUMBER.size <= len(page):
                offset = NUMBER.unpack_from(page, value)[0] * self.header.page + PAGE.size
            elif flags or value + size > len(page):
                raise self._damaged(f"page {number} is not what its tree says")
            if offset + size > self.size:
                raise self._damaged(f"page {number} has a value of {size} bytes beyond the end")
            yield page[key:value], offset, size
