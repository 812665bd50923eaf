"""CelebA (Liu et al. 2015), aligned and cropped: 202,599 colour photographs of faces, 178x218, without classes.

File names and MD5 are torchvision's. The files are on Google Drive, for non-commercial research only; nothing is
downloaded from there: the error says which files to put where. The zip file's images are read in place.
"""

import re
from pathlib import Path
from typing import Any

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Files
from dcgan.data.sources import archives, published
from dcgan.data.sources.archives import Member
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

PAGE = "http://mmlab.ie.cuhk.edu.hk/projects/CelebA.html"
ARCHIVE, ARCHIVE_MD5 = "img_align_celeba.zip", "00d2c5bc6d35e252742224ab0c1e8fcb"
PARTITION, PARTITION_MD5 = "list_eval_partition.txt", "d32c9cbf5e040fd4025c592c306e6668"
FOLDER = "img_align_celeba"
SPLITS = {"0": "train", "1": "validation", "2": "test"}  # of the partition file
PLACES = ("", "celeba/")  # the second is torchvision's
LISTED = re.compile(r"(\d{6}\.jpg) ([012])")


def signature(data: Data) -> Any:
    """The MD5 of the two files, or of one and a hash of the unpacked images' lengths and times; see `base.Source`.

    Raises FileNotFoundError, saying which files to put where, if data.source lacks them.
    """
    if data.source and not published.is_address(data.source):
        images, _ = _find(data.source)
        if images.name != ARCHIVE:
            return {PARTITION: PARTITION_MD5, FOLDER: archives.stamp(archives.in_directory(images))}
    return {PARTITION: PARTITION_MD5, ARCHIVE: ARCHIVE_MD5}


def read(data: Data, downloads: Path) -> Opened:
    """Splits train, validation and test as published, three channels; see `base.Source`.

    data.source: a directory with `list_eval_partition.txt` and the zip file, or the directory that it unpacks to; or a
    mirror of the two files; if not set, what a mirror gave before. Unpacked images have no published checksums.
    Raises ValueError, naming the image, if one is listed but missing.
    """
    images, partition = _located(data, downloads / "celeba")
    listed = _partition(published.check(partition, PARTITION_MD5))
    if images.name == ARCHIVE:
        members = _in_archive(published.check(images, ARCHIVE_MD5))
        source = published.describe(images)
    else:
        members = {member.name: member for member in archives.in_directory(images)}
        source = archives.listing(FOLDER, ((name, member.size) for name, member in members.items()))
    if absent := next((name for name in listed if name not in members), None):
        raise ValueError(f"{images} has no {absent}, which {partition.name} lists")
    return Opened(
        Description(data.name, (), data.size, 3, f"RGB; {TRANSFORM}"),
        {
            split: Files([members[name].entry(name, -1) for name, given in listed.items() if given == number])
            for number, split in SPLITS.items()
        },
        (source, published.describe(partition)),
    )


def _located(data: Data, downloads: Path) -> tuple[Path, Path]:
    """The zip file or the directory of the images, and the partition file; nothing is checked yet."""
    images, partition = downloads / ARCHIVE, downloads / PARTITION
    if data.source is None:
        if images.exists() and partition.exists():
            return images, partition
        raise FileNotFoundError(f"data.source is not set; {_advice()}")
    if published.is_address(data.source):
        published.fetch((), PARTITION, PARTITION_MD5, downloads, data)
        return published.fetch((), ARCHIVE, ARCHIVE_MD5, downloads, data), partition
    return _find(data.source)


def _find(source: str) -> tuple[Path, Path]:
    try:
        images = published.find(source, [f"{place}{name}" for place in PLACES for name in (ARCHIVE, FOLDER)])
        return images, published.find(source, [f"{place}{PARTITION}" for place in PLACES])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {_advice()}") from error


def _advice() -> str:
    return (
        f"CelebA is not downloaded automatically: put {ARCHIVE} (MD5 {ARCHIVE_MD5}), or the directory {FOLDER} that it "
        f"unpacks to, and {PARTITION} (MD5 {PARTITION_MD5}) from {PAGE} into one directory and set data.source to it"
    )


def _partition(path: Path) -> dict[str, str]:
    """Image name to number of its split, in the order of the file."""
    listed = {}
    for number, line in enumerate(path.read_text(encoding="ascii").splitlines(), 1):
        if not (match := LISTED.fullmatch(line.strip())):
            raise ValueError(f"{path}:{number}: {line!r} is not the name of an image and 0, 1 or 2")
        listed[match[1]] = match[2]
    return listed


def _in_archive(path: Path) -> dict[str, Member]:
    """The images in the zip file, by name."""
    files = [member for member in archives.in_zip(path) if member.name.startswith(f"{FOLDER}/")]
    return {member.name.removeprefix(f"{FOLDER}/"): member for member in files}
