"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images of ten classes, 32x32.

Address and MD5 are torchvision's. The files are pickles, which can run code when they are read: each one is compared
with its MD5 first, whether it was downloaded or found in a directory.
"""

from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import published
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

ADDRESSES = ("https://www.cs.toronto.edu/~kriz",)
ARCHIVE, ARCHIVE_MD5 = "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
FOLDER = "cifar-10-batches-py"
PLACES = ("data_batch_1", f"{FOLDER}/data_batch_1", ARCHIVE)  # in the directory of a data source
FILES = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
    "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
}


def signature(data: Data) -> Any:
    """The MD5 of the seven files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        published.find(data.source, PLACES)
    return FILES


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, three channels; see `base.Source`.

    data.source: a directory of the batches, of `cifar-10-batches-py/` or of the archive; or a mirror of the archive.
    """
    from torchvision.datasets import CIFAR10  # takes seconds; only this data set needs it

    folder = _batches(data, downloads / "cifar10")
    files = [published.check(folder / name, md5) for name, md5 in FILES.items()]
    here = type("CIFAR10", (CIFAR10,), {"base_folder": folder.name})  # so that the directory may have any name
    train, test = here(folder.parent, train=True), here(folder.parent, train=False)
    return Opened(
        Description(data.name, tuple(train.classes), data.size, 3, TRANSFORM),
        {name: Pixels(part.data, np.array(part.targets)) for name, part in (("train", train), ("test", test))},
        tuple(published.describe(file) for file in files),
    )


def _batches(data: Data, downloads: Path) -> Path:
    """The directory of the batches: where they were found, or unpacked from the archive under `downloads`."""
    found = published.locate(data, ADDRESSES, ARCHIVE, ARCHIVE_MD5, downloads, PLACES)
    if found.name != ARCHIVE:
        return found.parent
    return published.unpack(found, ARCHIVE_MD5, FILES, downloads / FOLDER)
