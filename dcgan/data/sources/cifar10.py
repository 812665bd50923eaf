"""CIFAR-10 (Krizhevsky 2009): 50,000 + 10,000 colour images, 32x32, ten classes; archive and MD5 are torchvision's."""

from pathlib import Path
from typing import Any

import numpy as np

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import cifar, published
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

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
SPLITS = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


def signature(data: Data) -> Any:
    """The MD5 of the seven files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        published.find(data.source, PLACES)
    return FILES


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, three channels; see `base.Source`.

    data.source: a directory of the batches, of `cifar-10-batches-py/` or of the archive; or a mirror of the archive.
    """
    release = cifar.Release(ARCHIVE, ARCHIVE_MD5, FOLDER, FILES, PLACES)
    content, files = cifar.read(release, data, downloads / "cifar10")
    splits = {}
    for split, names in SPLITS.items():
        batches = [content.pop(name) for name in names]
        pixels, labels = (np.concatenate([batch[key] for batch in batches]) for key in ("data", "labels"))
        splits[split] = Pixels(cifar.images(pixels), labels)
    classes = tuple(content["batches.meta"]["label_names"])
    return Opened(Description(data.name, classes, data.size, 3, TRANSFORM), splits, files)
