"""CIFAR-100 (Krizhevsky 2009): 50,000 + 10,000 colour images of 100 classes in 20 superclasses, 32x32.

Archive and MD5 are torchvision's. Its loader leaves the superclasses out; here they are read, too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import cifar, published
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

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
    release = cifar.Release(ARCHIVE, ARCHIVE_MD5, FOLDER, FILES, PLACES)
    content, files = cifar.read(release, data, downloads / "cifar100")
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
        {
            split: Pixels(cifar.images(content[split]["data"]), np.array(content[split]["fine_labels"], np.int64))
            for split in SPLITS
        },
        files,
    )


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
