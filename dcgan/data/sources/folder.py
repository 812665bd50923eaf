"""Any tree of images. A class is a first-level subdirectory that holds images, at any depth; a flat folder has none.

What counts as an image: a regular file with one of EXTENSIONS, in upper or lower case. Names that start with a dot and
symbolic links, to files or directories, are skipped (a link may form a cycle or lead out of the tree), as are other
extensions; their number is logged. An image's EXIF orientation is applied, and it is converted to RGB without its
transparency, as torchvision's ImageFolder converts it.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial as bind
from itertools import chain
from pathlib import Path
from typing import Any

from dcgan import environment
from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import PACKED, PREFIX, Block, Tree, batched, pack, unpack
from dcgan.data.sources import archives
from dcgan.data.sources.base import Opened, held_out, require_both
from dcgan.data.store import Description, SourceFile

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
DIGEST = 32  # bytes of a SHA-256


def signature(data: Data) -> Any:
    """A hash of every image's name, length and modification time; see `base.Source`."""
    root = _root(data)
    seen = hashlib.sha256(b"2")  # since TIFFs are turned once; stores from before are made again
    for name in chain.from_iterable(map(unpack, _names(root))):
        status = os.stat(f"{root}/{name}")
        seen.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def read(data: Data, downloads: Path) -> Opened:
    """Splits train and test by the hash of each file's bytes, three channels; see `base.Source`.

    Raises FileNotFoundError or ValueError if there are no images, some lie beside the classes or a split is empty.
    """
    root = _root(data)
    names = _names(root)
    classes = _classes(root, names)
    hashes, whole = _hashes(root, names)
    blocks = [Block(*block) for block in zip(names, hashes, strict=True)]
    files = Tree.of(root, {top: number for number, top in enumerate(classes)}, blocks)
    test = files.where(lambda sha256: held_out(sha256, data.test_fraction))
    train = files.where(lambda sha256: not held_out(sha256, data.test_fraction))
    require_both(str(root), len(train), len(test), data.test_fraction)
    shown = tuple(map(_shown, classes))
    return Opened(
        Description(data.name, shown, data.size, 3, f"EXIF orientation applied; RGB; {TRANSFORM}"),
        {"train": train, "test": test},
        (whole,),
    )


def _root(data: Data) -> Path:
    return archives.tree(data, "folder")


def _names(root: Path) -> list[bytes]:
    """The images' paths relative to the tree, PACKED at a time, in the order of `_walk`."""
    passed = Counter[str]()
    names = [pack(some) for some in batched(_walk(root, passed), PACKED)]
    others = ", ".join(f"{number} {kind}" for kind, number in sorted(passed.items()))
    if not names:
        raise ValueError(
            f"{root} has no images ({others or 'it is empty'}); they end in {', '.join(sorted(EXTENSIONS))}"
        )
    if passed:
        log.info("%s: %d images; passed over: %s", root, sum(len(unpack(some)) for some in names), others)
    return names


def _walk(root: Path, passed: Counter[str]) -> Iterator[str]:
    """The paths in sorted order, with only the entries of the directories down to the current one in memory."""
    pending = [""]
    while pending:
        if (at := pending.pop()) and not at.endswith("/"):
            yield at
        else:
            # With its slash a directory's name sorts as the paths below it do.
            pending += sorted((f"{at}{name}" for name in _entries(root / at, passed)), reverse=True)


def _entries(directory: Path, passed: Counter[str]) -> Iterator[str]:
    """The names of a directory's images, and of its directories with a slash; `passed` counts what is neither."""
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                passed["hidden"] += 1
            elif entry.is_symlink():
                passed["symbolic links"] += 1
            elif entry.is_dir():
                yield f"{entry.name}/"
            elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                yield entry.name
            else:
                passed["not images"] += 1


def _classes(root: Path, names: Sequence[bytes]) -> tuple[str, ...]:
    first: dict[str, str] = {}
    for name in chain.from_iterable(map(unpack, names)):
        top, below, _ = name.partition("/")
        first.setdefault(top if below else "", name)
    classes = tuple(sorted(first.keys() - {""}))
    if classes and "" in first:
        raise ValueError(
            f"{root / first['']} lies beside class directories ({classes[0]}, ...): move it into one or away"
        )
    return classes


def _shown(name: str) -> str:
    """A file's name as text that can be printed: what is not UTF-8 in it as \\x.."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _hashes(root: Path, names: Sequence[bytes]) -> tuple[list[bytes], SourceFile]:
    """The hashes of a `Block` for each block of names, and the tree as one file: all names and SHA-256.

    Uses threads: neither reading nor hashing holds the interpreter's lock.
    """
    hashes, whole, size = [], hashlib.sha256(), 0
    with ThreadPoolExecutor(environment.cpus()) as pool:
        for some, (found, length) in zip(names, pool.map(bind(_hash_block, root), names), strict=True):
            each = [found[i : i + DIGEST] for i in range(0, len(found), DIGEST)]
            for name, sha256 in zip(unpack(some), each, strict=True):
                whole.update(os.fsencode(name) + b"\0" + sha256)
            hashes.append(b"".join(sha256[:PREFIX] for sha256 in each))
            size += length
    return hashes, SourceFile("tree", size, whole.hexdigest())


def _hash_block(root: Path, names: bytes) -> tuple[bytes, int]:
    """The SHA-256 of each file, concatenated, and the files' total size in bytes."""
    digests, size = bytearray(), 0
    for name in unpack(names):
        with open(f"{root}/{name}", "rb", buffering=0) as file:
            raw = file.read()
        digests += hashlib.sha256(raw).digest()
        size += len(raw)
    return bytes(digests), size
