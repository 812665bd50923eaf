"""Any tree of images. A class is a first-level subdirectory that holds images, at any depth; a flat folder has none.

What counts as an image: a regular file with one of EXTENSIONS, in upper or lower case. Names that start with a dot and
symbolic links, to files or directories, are passed over (a link may lead round in a circle or out of the tree), as are
other extensions; their number is logged. An image is turned as its EXIF orientation says and converted to RGB without
its transparency, as torchvision's ImageFolder does.
"""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Tree
from dcgan.data.sources import archives
from dcgan.data.sources.base import Opened, held_out, require_both
from dcgan.data.store import Description, SourceFile

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
BLOCK = 256  # files that a thread hashes before it hands them over


def signature(data: Data) -> Any:
    """A hash of every image's name, length and time of change; see `base.Source`."""
    root = _root(data)
    seen = hashlib.sha256()
    for name in _names(root):
        status = (root / name).stat()
        seen.update(os.fsencode(name) + f"\0{status.st_size} {status.st_mtime_ns}\n".encode())
    return seen.hexdigest()


def read(data: Data, downloads: Path) -> Opened:
    """Splits train and test by the hash of each file's bytes, three channels; see `base.Source`.

    Raises FileNotFoundError or ValueError if there are no images, some lie beside the classes or a split is empty.
    """
    root = _root(data)
    names = _names(root)
    classes = _classes(root, names)
    number = {top: number for number, top in enumerate(classes)}
    labels = np.array([number.get(_top(name), -1) for name in names], np.int64)
    hashes = np.frombuffer(b"".join(_hashes(root, names)), np.uint8).reshape(-1, 32)
    files = Tree(root, names, labels, hashes)
    test = np.array([held_out(sha256.tobytes(), data.test_fraction) for sha256 in hashes])
    require_both(str(root), int((~test).sum()), int(test.sum()), data.test_fraction)
    return Opened(
        Description(data.name, classes, data.size, 3, f"EXIF orientation applied; RGB; {TRANSFORM}"),
        {"train": files.where(~test), "test": files.where(test)},
        (_whole(files),),
    )


def _root(data: Data) -> Path:
    return archives.tree(data, "folder")


def _names(root: Path) -> list[str]:
    """The images' paths relative to the tree, sorted, so that the order does not depend on the file system."""
    found, passed = [], Counter[str]()
    pending = [""]
    while pending:
        with os.scandir(root / (at := pending.pop())) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    passed["hidden"] += 1
                elif entry.is_symlink():
                    passed["symbolic links"] += 1
                elif entry.is_dir():
                    pending.append(f"{at}{entry.name}/")
                elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                    found.append(f"{at}{entry.name}")
                else:
                    passed["not images"] += 1
    others = ", ".join(f"{number} {kind}" for kind, number in sorted(passed.items()))
    if not found:
        raise ValueError(
            f"{root} has no images ({others or 'it is empty'}); they end in {', '.join(sorted(EXTENSIONS))}"
        )
    if passed:
        log.info("%s: %d images; passed over: %s", root, len(found), others)
    return sorted(found)


def _top(name: str) -> str:
    return name.partition("/")[0] if "/" in name else ""


def _classes(root: Path, names: Sequence[str]) -> tuple[str, ...]:
    tops = sorted({_top(name) for name in names})
    if tops == [""]:
        return ()
    if tops[0] == "":
        stray = next(name for name in names if not _top(name))
        raise ValueError(f"{root / stray} lies beside class directories ({tops[1]}, ...): move it into one or away")
    return tuple(tops)


def _hashes(root: Path, names: Sequence[str]) -> Iterator[bytes]:
    """The SHA-256 of each file, in order, by threads; neither reading nor hashing holds the interpreter's lock."""
    blocks = [names[start : start + BLOCK] for start in range(0, len(names), BLOCK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for hashes in pool.map(lambda block: [hashlib.sha256(_bytes(root, name)).digest() for name in block], blocks):
            yield from hashes


def _bytes(root: Path, name: str) -> bytes:
    with open(root / name, "rb") as file:
        return file.read()


def _whole(files: Tree) -> SourceFile:
    whole = hashlib.sha256()
    for name, sha256 in zip(files.names, files.hashes, strict=True):
        whole.update(os.fsencode(name) + b"\0" + sha256.tobytes())
    return SourceFile("tree", sum((files.root / name).stat().st_size for name in files.names), whole.hexdigest())
