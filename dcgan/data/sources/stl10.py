"""STL-10 (Coates, Lee and Ng 2011): 100,000 colour images without labels, 5,000 + 8,000 of ten classes, 96x96.

Address and MD5 are torchvision's; the names of the classes are from the data set's page. A GAN is trained on the images
without labels; `train` and `test` are what its features are scored on. The files are read through memory maps.
"""

import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from dcgan import storage
from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Pixels
from dcgan.data.sources import published
from dcgan.data.sources.base import Opened
from dcgan.data.sources.partial import locked
from dcgan.data.store import Description

ADDRESSES = ("http://ai.stanford.edu/~acoates/stl10",)
ARCHIVE, ARCHIVE_MD5 = "stl10_binary.tar.gz", "91f7769df0f17e558f3565bffb0c7dfb"
FOLDER = "stl10_binary"
FILES = {
    "unlabeled_X.bin": "5242ba1fed5e4be9e1e742405eb56ca4",
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
SIDE = 96


def signature(data: Data) -> Any:
    """The MD5 of the five files: wherever they come from, only those are accepted; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        _find(data.source)
    return FILES


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, `unlabelled` first, three channels; see `base.Source`.

    data.source: a directory of the .bin files, of `stl10_binary/` or of the archive; or a mirror of the archive.
    """
    folder = _checked(data, downloads / "stl10")
    splits = {"unlabelled": Pixels(_images(folder / "unlabeled_X.bin"), None)}
    for split in ("train", "test"):
        splits[split] = Pixels(_images(folder / f"{split}_X.bin"), _labels(folder / f"{split}_y.bin"))
    return Opened(
        Description(data.name, CLASSES, data.size, 3, TRANSFORM, ("unlabelled",)),
        splits,
        tuple(published.describe(folder / name) for name in FILES),
    )


def _find(source: str) -> Path:
    return published.find(source, [f"{FOLDER}/train_X.bin", "train_X.bin", ARCHIVE])


def _checked(data: Data, downloads: Path) -> Path:
    """The directory of the five files, each compared with its MD5: where they lie, or unpacked under `downloads`."""
    kept = downloads / FOLDER
    found = None if data.source is None or published.is_address(data.source) else _find(data.source)
    if found and found.name != ARCHIVE:
        return _check_all(found.parent)
    if _is_whole(kept):
        return kept
    archive = published.check(found, ARCHIVE_MD5) if found else None
    archive = archive or published.fetch(ADDRESSES, ARCHIVE, ARCHIVE_MD5, downloads, data)
    downloads.mkdir(parents=True, exist_ok=True)
    with locked(downloads / f".{FOLDER}.lock"):  # an ingestion at another size may unpack it, too
        if _is_whole(kept):
            return kept
        if kept.is_dir():
            storage.discard(kept)  # ours: it is unpacked again
        return _unpack(archive, kept)


def _is_whole(folder: Path) -> bool:
    try:
        return bool(_check_all(folder))
    except (FileNotFoundError, storage.CorruptError):
        return False


def _check_all(folder: Path) -> Path:
    for name, md5 in FILES.items():
        published.check(folder / name, md5)
    return folder


def _unpack(archive: Path, folder: Path) -> Path:
    """Write the five members, and nothing else of the archive, aside; rename them into place when all are checked.

    archive: it has the published MD5. Raises CorruptError, naming the member, if one is not the published file.
    """
    with storage.staging(folder.parent) as staged:
        with tarfile.open(archive, "r|*") as members:  # a stream: nothing is read twice
            for member in members:
                directory, _, name = member.name.rpartition("/")
                if directory != FOLDER or name not in FILES:
                    continue
                content = members.extractfile(member) if member.isreg() else None
                if content is None:
                    raise storage.CorruptError(f"{archive}: {member.name} is not a regular file")
                with (staged / name).open("wb") as file:
                    shutil.copyfileobj(content, file, 2**20)
        if missing := [name for name in FILES if not (staged / name).exists()]:
            raise storage.CorruptError(f"{archive} lacks {', '.join(f'{FOLDER}/{name}' for name in missing)}")
        os.rename(_check_all(staged), folder)
    return folder


def _images(path: Path) -> np.ndarray:
    """A memory map, uint8 (N, 96, 96, 3), of images that lie channel by channel and column by column."""
    return np.memmap(path, np.uint8, "r").reshape(-1, 3, SIDE, SIDE).transpose(0, 3, 2, 1)


def _labels(path: Path) -> np.ndarray:
    """int64 (N,) from 0; in the file they start at 1."""
    return np.fromfile(path, np.uint8).astype(np.int64) - 1
