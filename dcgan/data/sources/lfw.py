"""LFW (Huang et al. 2007), deep-funneled: 13,233 colour photographs of faces, 250x250, without classes.

Address and MD5 are torchvision's, which notes that the address no longer serves the archive: the error then says what
to put where. The archive is decompressed to a .tar under `downloads`, and its images are read in place there. Train and
test are chosen by the hash of each image's bytes, not by person: both may have photographs of one person.
"""

import gzip
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Entry, Files
from dcgan.data.sources import archives, published
from dcgan.data.sources.archives import Member
from dcgan.data.sources.attempts import DownloadError
from dcgan.data.sources.base import Opened, held_out, require_both
from dcgan.data.store import Description

ADDRESSES = ("http://vis-www.cs.umass.edu/lfw",)
ARCHIVE, ARCHIVE_MD5 = "lfw-deepfunneled.tgz", "68331da3eb755a505a502b5aacb3c201"
FOLDER = "lfw-deepfunneled"
COUNT = 13_233
PLACES = ("", "lfw-py/")  # the second is torchvision's


def signature(data: Data) -> Any:
    """The archive's MD5, or a hash of the names, lengths and modification times of a tree; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        found = _find(data.source)
        if found.name != ARCHIVE:
            return archives.stamp(_in_tree(found))
    return ARCHIVE_MD5


def read(data: Data, downloads: Path) -> Opened:
    """Splits train and test by the hash of each file's bytes, three channels; see `base.Source`.

    data.source: a directory of the archive or of `lfw-deepfunneled/`, or a mirror of the archive. An unpacked tree has
    no published checksums: its images are counted. Raises ValueError unless there are 13,233.
    """
    found = _located(data, downloads / "lfw")
    if found.name == ARCHIVE:
        members, source = _in_archive(found, downloads / "lfw"), published.describe(found)
    else:
        members = _in_tree(found)
        source = archives.listing(FOLDER, ((member.name, member.size) for member in members))
    if len(members) != COUNT:
        raise ValueError(f"{found} has {len(members)} images of faces; LFW has {COUNT}")
    entries = list(_hashed([member.entry(member.name, -1) for member in members]))
    test = [entry for entry in entries if held_out(entry.sha256, data.test_fraction)]
    train = [entry for entry in entries if not held_out(entry.sha256, data.test_fraction)]
    require_both(data.name, len(train), len(test), data.test_fraction)
    return Opened(
        Description(data.name, (), data.size, 3, f"RGB; {TRANSFORM}"),
        {"train": Files(train), "test": Files(test)},
        (source,),
    )


def _find(source: str) -> Path:
    if Path(source).name == FOLDER and Path(source).is_dir():
        return Path(source)
    return published.find(source, [f"{place}{name}" for place in PLACES for name in (ARCHIVE, FOLDER)])


def _located(data: Data, downloads: Path) -> Path:
    """The archive, with its MD5, or the directory of the unpacked tree."""
    if data.source and not published.is_address(data.source):
        found = _find(data.source)
        return published.check(found, ARCHIVE_MD5) if found.name == ARCHIVE else found
    try:
        return published.fetch(ADDRESSES, ARCHIVE, ARCHIVE_MD5, downloads, data)
    except (DownloadError, FileNotFoundError) as error:
        if data.source:
            raise
        raise FileNotFoundError(
            f"{error}; LFW's own server may be gone for good: put {ARCHIVE} (MD5 {ARCHIVE_MD5}) into a directory and "
            "set data.source to it"
        ) from error


def _in_archive(archive: Path, downloads: Path) -> list[Member]:
    """The images in the archive, as stretches of the .tar that it is decompressed to, named as in a tree."""
    tar = downloads / f"{FOLDER}.tar"
    with storage.staging(downloads) as staged:
        with gzip.open(archive) as packed, (aside := staged / tar.name).open("wb") as file:
            shutil.copyfileobj(packed, file, 2**20)
        os.replace(aside, tar)
    members = [each._replace(name=each.name.removeprefix(f"{FOLDER}/")) for each in archives.in_tar(tar)]
    return [member for member in members if _is_image(member.name)]


def _in_tree(root: Path) -> list[Member]:
    """The images of the unpacked tree, sorted by name."""
    people = sorted(path.name for path in root.iterdir() if path.is_dir())
    found = [(person, member) for person in people for member in archives.in_directory(root / person)]
    members = [member._replace(name=f"{person}/{member.name}") for person, member in found]
    return sorted(member for member in members if _is_image(member.name))


def _is_image(name: str) -> bool:
    """Whether this is PERSON/PERSON_0001.jpg: archives have their makers' hidden files beside the images."""
    person, _, file = name.partition("/")
    return file.startswith(f"{person}_") and file.endswith(".jpg")


def _hashed(entries: Sequence[Entry]) -> Iterator[Entry]:
    """The entries with the hashes of their bytes; only one image at a time is in memory."""
    for entry, item in zip(entries, Files(entries), strict=True):
        assert isinstance(item.image, bytes)
        yield entry._replace(sha256=hashlib.sha256(item.image).digest())
