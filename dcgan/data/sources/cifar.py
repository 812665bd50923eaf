"""What CIFAR-10's and CIFAR-100's releases (Krizhevsky 2009) have in common: a server, and batches that are pickles.

Pickles can run code when they are read. So each file is compared with its published MD5 first, whether it was
downloaded or found in a directory, and then read by `pickles.py`, which builds arrays and nothing else.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dcgan.config import Data
from dcgan.data.sources import pickles, published
from dcgan.data.store import SourceFile

ADDRESSES = ("https://www.cs.toronto.edu/~kriz",)


class Release(NamedTuple):
    """An archive with its MD5, the folder in it, that folder's files with their MD5, and where users keep either."""

    archive: str
    archive_md5: str
    folder: str
    files: Mapping[str, str]
    places: tuple[str, ...]


def read(release: Release, data: Data, downloads: Path) -> tuple[dict[str, dict[str, Any]], tuple[SourceFile, ...]]:
    """The content of each file by its name, and the files. The archive is downloaded and unpacked under `downloads`.

    Raises what `published.locate` raises, and CorruptError for a file that is not the published one.
    """
    found = published.locate(data, ADDRESSES, release.archive, release.archive_md5, downloads, release.places)
    folder = found.parent
    if found.name == release.archive:
        folder = published.unpack(found, release.archive_md5, release.files, downloads / release.folder)
    files = [published.check(folder / name, md5) for name, md5 in release.files.items()]
    return {file.name: pickles.read(file) for file in files}, tuple(published.describe(file) for file in files)


def images(rows: np.ndarray) -> np.ndarray:
    """uint8 (N, 3072), channel by channel and row by row, as (N, 32, 32, 3)."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
