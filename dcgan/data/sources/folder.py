"""Any tree of images. A class is a first-level subdirectory that holds images, at any depth; a flat folder has none.

What counts as an image: a regular file with one of EXTENSIONS, in upper or lower case. Names that start with a dot and
symbolic links, to files or directories, are passed over (a link may lead round in a circle or out of the tree), as are
other extensions; their number is logged. An image is turned as its EXIF orientation says and converted to RGB without
its transparency, as torchvision's ImageFolder does.
"""

import hashlib
import io
import logging
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from dcgan.config import Data
from dcgan.data.sources.base import TRANSFORM, Labelled, Opened, held_out, require_both, square
from dcgan.data.store import Description, SourceFile

log = logging.getLogger(__name__)

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # whatever the name says; EPS would start Ghostscript
BLOCK = 512  # images in memory at once: at 128 px RGB 24 MiB
# What Pillow 13 raises on damaged files of FORMATS, found by flipping bytes; OSError covers truncation.
UNDECODABLE = (OSError, SyntaxError, ValueError, EOFError, TypeError, struct.error, Image.DecompressionBombError)
T = TypeVar("T")
R = TypeVar("R")


class _File(NamedTuple):
    path: Path
    name: str  # relative to the tree
    label: int
    sha256: bytes


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
    While the splits are read, ValueError names a file that can't be decoded, unless `data.unreadable` is `skip`.
    """
    root = _root(data)
    names = _names(root)
    classes = _classes(root, names)
    hashes = _in_order(lambda name: _sha256(root / name), names)
    files = [
        _File(root / name, name, classes.index(_top(name)) if classes else -1, sha256)
        for name, sha256 in zip(names, hashes, strict=True)
    ]
    test = [file for file in files if held_out(file.sha256, data.test_fraction)]
    train = [file for file in files if not held_out(file.sha256, data.test_fraction)]
    require_both(str(root), len(train), len(test), data.test_fraction)
    skipped: list[str] = []
    return Opened(
        Description(data.name, classes, data.size, 3, f"EXIF orientation applied; RGB; {TRANSFORM}"),
        tuple((split, _decoded(part, data, skipped)) for split, part in (("train", train), ("test", test))),
        (_tree(files),),
        skipped,
    )


def _root(data: Data) -> Path:
    root = Path(data.source or "").expanduser().absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"data.source={data.source} is not a directory")
    return root


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


def _sha256(path: Path) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def _in_order(function: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
    """`map` by threads, a block at a time to bound memory; Pillow decodes without the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(items), BLOCK):
            yield from pool.map(function, items[start : start + BLOCK])


def _tree(files: Sequence[_File]) -> SourceFile:
    whole = hashlib.sha256()
    for file in files:
        whole.update(os.fsencode(file.name) + b"\0" + file.sha256)
    return SourceFile("tree", sum(file.path.stat().st_size for file in files), whole.hexdigest())


def _decoded(files: Sequence[_File], data: Data, skipped: list[str]) -> Iterator[Labelled]:
    for file, image in zip(files, _in_order(lambda file: _decode(file, data.size), files), strict=True):
        if isinstance(image, np.ndarray):
            yield image, file.label
        elif data.unreadable == "refuse":
            raise ValueError(f"{file.path} can't be decoded ({image}): remove it, or set data.unreadable=skip")
        else:
            log.warning("%s skipped: %s", file.path, image)
            skipped.append(file.name)


def _decode(file: _File, size: int) -> np.ndarray | str:
    """The image, uint8 (3, size, size), or in words why it can't be had."""
    raw = file.path.read_bytes()  # a failing disk or a missing permission is raised, never skipped
    if hashlib.sha256(raw).digest() != file.sha256:
        raise ValueError(f"{file.path} changed while it was being read")
    try:
        with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
            if image.width * image.height > (limit := Image.MAX_IMAGE_PIXELS or 0):
                return f"{image.width} x {image.height} pixels are more than Pillow's limit of {limit}"
            if image.mode[0] in "IF":  # Pillow would clip it to white instead of scaling it
                return f"mode {image.mode}: more than 8 bits a channel"
            return square(ImageOps.exif_transpose(image).convert("RGB"), size)
    except UnidentifiedImageError:
        return f"not a {', '.join(FORMATS)} file"
    except UNDECODABLE as error:
        return str(error)
