"""Tiny ImageNet (Stanford CS231n): 100,000 + 10,000 photographs of 200 of ImageNet's classes, 64x64.

The address is from the course's page, the MD5 is the one that several loaders have. The images are read in place,
inside the zip file. The validation images, whose labels are published, are the split `test`; the published test images
have no labels.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Entry, Files
from dcgan.data.sources import archives, published
from dcgan.data.sources.archives import Member
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

ADDRESSES = ("http://cs231n.stanford.edu",)
FOLDER = "tiny-imagenet-200"
ARCHIVE, ARCHIVE_MD5 = f"{FOLDER}.zip", "90528d7ca1a48142e341f4ef8d21d0de"
CLASSES = 200
COUNTS = {"train": 100_000, "test": 10_000}
Tree = Mapping[str, Member]  # by path in the data set


def signature(data: Data) -> Any:
    """The MD5 of the zip file, or a hash of the names, lengths and modification times of a tree; see `base.Source`."""
    if data.source and not published.is_address(data.source):
        found = _find(data.source)
        if found.name != ARCHIVE:
            return archives.stamp(_unpacked(found.parent).values())
    return ARCHIVE_MD5


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, three channels, classes sorted; see `base.Source`.

    data.source: a directory of the zip file, or what it unpacks to, or a mirror of the zip file. Raises ValueError,
    saying what is missing, unless there are 100,000 + 10,000 images of 200 classes.
    """
    found, tree = _located(data, downloads / "tiny_imagenet")
    wnids = sorted(_text(tree, "wnids.txt", found).split())
    if len(set(wnids)) != CLASSES:
        raise ValueError(f"{found}: wnids.txt has {len(set(wnids))} classes; Tiny ImageNet has {CLASSES}")
    label = {wnid: number for number, wnid in enumerate(wnids)}
    images = {"train": _training(tree, label), "test": _validation(tree, label, found)}
    for split, entries in images.items():
        if len(entries) != COUNTS[split]:
            raise ValueError(f"{found} has {len(entries)} images in split {split}; published are {COUNTS[split]}")
    return Opened(
        Description(data.name, tuple(wnids), data.size, 3, f"RGB; {TRANSFORM}"),
        {split: Files(entries) for split, entries in images.items()},
        tuple(
            archives.listing(split, ((entry.name, tree[entry.name].size) for entry in entries))
            for split, entries in images.items()
        ),
    )


def _find(source: str) -> Path:
    return published.find(source, ["wnids.txt", f"{FOLDER}/wnids.txt", ARCHIVE])


def _located(data: Data, downloads: Path) -> tuple[Path, Tree]:
    """The directory or the zip file, which has the published MD5, and what is in it."""
    if data.source is None or published.is_address(data.source):
        found = published.fetch(ADDRESSES, ARCHIVE, ARCHIVE_MD5, downloads, data)
    else:
        found = _find(data.source)
        if found.name != ARCHIVE:
            return found.parent, _unpacked(found.parent)
        published.check(found, ARCHIVE_MD5)
    return found, {member.name.removeprefix(f"{FOLDER}/"): member for member in archives.in_zip(found)}


def _unpacked(root: Path) -> Tree:
    """The files that are used, in the order of their names."""
    names = ["wnids.txt", "val/val_annotations.txt"]
    tree = {name: archives.file(root / name)._replace(name=name) for name in names if (root / name).is_file()}
    for folder in [*sorted((root / "train").glob("n*/images")), root / "val" / "images"]:
        if folder.is_dir():
            at = folder.relative_to(root).as_posix()
            tree |= {f"{at}/{m.name}": m._replace(name=f"{at}/{m.name}") for m in archives.in_directory(folder)}
    return tree


def _training(tree: Tree, label: Mapping[str, int]) -> list[Entry]:
    """train/<wnid>/images/<name>.JPEG, by class and name."""
    found = []
    for name in sorted(tree):
        match name.split("/"):
            case ["train", wnid, "images", _] if wnid in label:
                found.append(tree[name].entry(name, label[wnid]))
    return found


def _validation(tree: Tree, label: Mapping[str, int], found: Path) -> list[Entry]:
    """val/images/<name>, as annotated, in that order. A line is: name, class and a box, separated by tabs."""
    entries = []
    for line in _text(tree, "val/val_annotations.txt", found).splitlines():
        name, wnid, *_ = [*line.split("\t"), ""]
        path = f"val/images/{name}"
        if path not in tree or wnid not in label:
            raise ValueError(f"{found}: val_annotations.txt has {name} of class {wnid!r}; one of the two is not there")
        entries.append(tree[path].entry(path, label[wnid]))
    return entries


def _text(tree: Tree, name: str, found: Path) -> str:
    if name not in tree:
        raise ValueError(f"{found} has no {name}")
    (item,) = Files([tree[name].entry(name, -1)])
    assert isinstance(item.image, bytes), "Files gives the bytes of files"
    return item.image.decode("ascii", "replace")
