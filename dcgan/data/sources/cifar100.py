"""CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 100 classes in 20 superclasses, 32x32.

Address and MD5 are torchvision's. Its loader leaves the superclasses out, so the files are read here. They are pickles,
which can run code when they are read: each one is compared with its MD5 first, whether it was downloaded or found in a
directory, and then read by `pickles.py`, which builds arrays and nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import pickles, published
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

ADDRESSES = ("https://www.cs.toronto.edu/~kriz",)
ARCHIVE, ARCHIVE_MD5 = "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
FOLDER = "cifar-100-python"
PLACES = (f"{FOLDER}/train", ARCHIVE, "train")  # in the directory of a data source
FILES = {
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}
SPLITS = ("train", "test")


def signature(data: Data) -> Any:
    """The MD5 of the three files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        published.find(data.source, PLACES)
    return FILES


def read(data: Data, downloads: Path) -> Opened:
    """The published splits with the 100 fine labels, three channels; see `base.Source`.

    data.source: a directory of the files, of `cifar-100-python/` or of the archive; or a mirror of the archive.
    Raises ValueError if a class is not in exactly one superclass.
    """
    folder = _batches(data, downloads / "cifar100")
    files = [published.check(folder / name, md5) for name, md5 in FILES.items()]
    content = {file.name: _unpickle(file) for file in files}
    classes, superclasses = (tuple(content["meta"][f"{kind}_label_names"]) for kind in ("fine", "coarse"))
    superclass_of = _superclass_of(content, classes, len(superclasses))
    return Opened(
        Description(
            data.name,
            classes,
            data.size,
            3,
            TRANSFORM,
            superclasses=superclasses,
            superclass_of=superclass_of,
        ),
        {split: Pixels(_images(content[split]), np.array(content[split]["fine_labels"], np.int64)) for split in SPLITS},
        tuple(published.describe(file) for file in files),
    )


def _batches(data: Data, downloads: Path) -> Path:
    """The directory of the files: where they were found, or unpacked from the archive under `downloads`."""
    found = published.locate(data, ADDRESSES, ARCHIVE, ARCHIVE_MD5, downloads, PLACES)
    if found.name != ARCHIVE:
        return found.parent
    return published.unpack(found, ARCHIVE_MD5, FILES, downloads / FOLDER)


def _unpickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        content: dict[str, Any] = pickles.load(file)
    return content


def _images(batch: Mapping[str, Any]) -> np.ndarray:
    """uint8 (N, 3072), channel by channel and row by row, as (N, 32, 32, 3)."""
    rows: np.ndarray = batch["data"]
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _superclass_of(content: Mapping[str, Mapping[str, Any]], classes: tuple[str, ...], count: int) -> tuple[int, ...]:
    """The superclass, below `count`, of each class: found from the two labels of every image of both splits."""
    labels = [zip(content[split]["fine_labels"], content[split]["coarse_labels"], strict=True) for split in SPLITS]
    pairs = {(int(fine), int(coarse)) for split in labels for fine, coarse in split}
    found = []
    for label, name in enumerate(classes):
        of = sorted(coarse for fine, coarse in pairs if fine == label)
        if len(of) != 1 or of[0] not in range(count):
            raise ValueError(f"cifar100: class {name!r} is in superclasses {of}; expected one of 0 to {count - 1}")
        found += of
    return tuple(found)
