"""ImageNet, ILSVRC-2012: 1,281,167 training and 50,000 validation photographs of 1,000 classes, of any size.

Its terms of access forbid fetching it on someone's behalf, so `data.source` is required. The classes are WordNet ids,
sorted, and the images are in the order of torchvision's ImageFolder, whether they come from class directories or from
the published tar files, which are read in place. The MD5 and the way the development kit is read are torchvision's
(`ImageNet`).
"""

import io
import logging
import os
import re
import tarfile
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.records import Files
from dcgan.data.sources import archives, published
from dcgan.data.sources.archives import Member
from dcgan.data.sources.base import Opened
from dcgan.data.store import Description

log = logging.getLogger(__name__)

PAGE = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
MD5 = {
    TRAIN: "1d675b47d978889d74fa0da5fadfb00e",
    VAL: "29b22e2961454d5413ddabcf34fc5622",
    DEVKIT: "fa75699e90414af021442c21a62c3abf",
}
ADVICE = (
    f"ImageNet's terms forbid downloading it automatically: put {TRAIN} (MD5 {MD5[TRAIN]}), {VAL} (MD5 {MD5[VAL]}) and "
    f"{DEVKIT} (MD5 {MD5[DEVKIT]}) from {PAGE}, or train/<wnid>/*.JPEG and val/<wnid>/*.JPEG, into one directory and "
    "set data.source to it"
)
KIT = "ILSVRC2012_devkit_t12/data"
LATER = "ILSVRC/Data/CLS-LOC"  # where the archive of the later challenges has the same images
FOLDER = "imagenet"  # under downloads
CLASSES = 1_000
COUNTS = {"train": 1_281_167, "test": 50_000}
WNID = re.compile(r"n\d{8}")  # a WordNet id of a noun, which is what a class is called
Classes = Mapping[str, list[Member]]  # images by class, both sorted


def signature(data: Data) -> Any:
    """Published MD5, or a hash of the names, lengths and modification times of a tree's files; see `base.Source`."""
    if mirrored(data):
        return MD5
    root = local(data)
    train, val = training(root), validation(root)
    flat = val is not None and not classes_in(val)
    return {"train": state(train), "val": val and state(val), "labels": MD5[DEVKIT] if flat else None}


def read(data: Data, downloads: Path) -> Opened:
    """Splits train and test (the validation images, if they are there), three channels; see `base.Source`.

    data.source: a directory with `train/<wnid>/` and `val/<wnid>/`, or these under `ILSVRC/Data/CLS-LOC/`, or with the
    published tar files, or with some of each; or a mirror of the tar files. A flat `val/` serves like its tar file: the
    labels of both are in the development kit. Raises ValueError unless there are 1,000 classes.
    """
    root = located(data, downloads, MD5)
    train, val = training(root), validation(root)
    splits = {"train": classes(train)}
    if (found := len(splits["train"])) != CLASSES:
        raise ValueError(f"{train} has {found} classes; ImageNet has {CLASSES}")
    if empty := next((wnid for wnid, images in splits["train"].items() if not images), None):
        raise ValueError(f"{train}: {empty} has no images")
    if val is None:
        log.warning("%s has no validation images: the store will have no split test", root)
    else:
        splits["test"] = classes(val) if classes_in(val) else _labelled(val, root / DEVKIT)
        if strange := sorted(splits["test"].keys() - splits["train"].keys()):
            raise ValueError(f"{val} has images of {strange[0]}; {train} has none")
    for split, images in splits.items():
        if (number := sum(map(len, images.values()))) != COUNTS[split]:
            log.warning("%s: %d images in split %s; %d were published", root, number, split, COUNTS[split])
    return opened(data, splits)


def opened(data: Data, splits: Mapping[str, Classes]) -> Opened:
    """Images by split and class, labelled by the order of the training classes; tree or tar, the result is the same."""
    label = {wnid: number for number, wnid in enumerate(splits["train"])}
    files, sources = {}, []
    for split, images in splits.items():
        named = [(f"{wnid}/{Path(m.name).name}", m, label[wnid]) for wnid, members in images.items() for m in members]
        files[split] = Files([member.entry(name, number) for name, member, number in named])
        sources.append(archives.listing(split, ((name, member.size) for name, member, _ in named)))
    return Opened(Description(data.name, tuple(label), data.size, 3, f"RGB; {TRANSFORM}"), files, tuple(sources))


def mirrored(data: Data) -> bool:
    """Whether `data.source` is an http(s) address, which serves the tar files; S3 may hold a tree."""
    return (data.source or "").startswith(("http://", "https://"))


def located(data: Data, downloads: Path, names: Container[str]) -> Path:
    """The directory that has the data set; its tar files among `names` have been compared with their MD5.

    Raises FileNotFoundError, saying which files to put where, if `data.source` is not set.
    """
    folder = downloads / FOLDER
    wanted = [name for name in MD5 if name in names]
    if mirrored(data):
        for name in wanted:
            published.fetch((), name, MD5[name], folder, data)
        return folder
    root = local(data, folder)
    for tar in [path for path in (training(root), validation(root), root / DEVKIT) if path and path.name in wanted]:
        if tar.is_file():
            log.info("%s: comparing %.1f GB with the published MD5", tar, tar.stat().st_size / 1e9)
            published.check(tar, MD5[tar.name])
    return root


def local(data: Data, folder: Path | None = None) -> Path:
    """The directory of `data.source`, staged into `folder` if at S3; raises FileNotFoundError if it is not set."""
    if data.source is None:
        raise FileNotFoundError(f"data.source is not set; {ADVICE}")
    return published.tree(data, folder) if folder else archives.tree(data, FOLDER)


def training(root: Path) -> Path:
    """The tree or the tar file of the training images; raises FileNotFoundError, saying what is needed."""
    if classes_in(root):
        return root
    try:
        return published.find(str(root), ["train", f"{LATER}/train", TRAIN])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; {ADVICE}") from error


def validation(root: Path) -> Path | None:
    """The tree or the tar file of the validation images, if there is one."""
    return next((root / at for at in ("val", f"{LATER}/val", VAL) if (root / at).exists()), None)


def classes_in(images: Path) -> list[str]:
    """The class directories of a tree, sorted; none in a flat one or a tar file. Links to directories count."""
    if not images.is_dir():
        return []
    with os.scandir(images) as entries:
        return sorted(entry.name for entry in entries if WNID.fullmatch(entry.name) and entry.is_dir())


def state(images: Path, wanted: Container[str] | None = None) -> str:
    """The MD5 of a tar file, or a hash of the names, lengths and modification times of a tree's (wanted) files."""
    if not images.is_dir():
        return MD5[images.name]
    members = [] if wanted else archives.in_directory(images)
    for wnid, found in classes(images, wanted).items():
        members += [member._replace(name=f"{wnid}/{member.name}") for member in found]
    return archives.stamp(members)


def classes(images: Path, wanted: Container[str] | None = None) -> dict[str, list[Member]]:
    """The images of a tree, or of a tar file of tar files, by class; only of the wanted classes, if given."""
    if images.is_dir():
        return {wnid: archives.in_directory(images / wnid) for wnid in classes_in(images) if _in(wnid, wanted)}
    log.info("%s: listing the images", images)
    tars = archives.in_nested_tar(images, lambda name: _in(name.removesuffix(".tar"), wanted))
    return dict(sorted((name.removesuffix(".tar"), members) for name, members in tars))


def _in(wnid: str, wanted: Container[str] | None) -> bool:
    return bool(WNID.fullmatch(wnid)) and (wanted is None or wnid in wanted)


def _labelled(images: Path, devkit: Path) -> dict[str, list[Member]]:
    """The validation images of a flat tree or a tar file by class, in the order of their names, as the labels are."""
    if not devkit.is_file():
        raise FileNotFoundError(f"{images} has images without class directories; their labels are in {devkit}: add it")
    members = archives.in_directory(images) if images.is_dir() else archives.in_tar(images)
    wnids = validation_labels(devkit)
    if len(members) != len(wnids):
        raise ValueError(f"{images} has {len(members)} images; {devkit} has labels of {len(wnids)}")
    found: dict[str, list[Member]] = {wnid: [] for wnid in sorted(set(wnids))}
    for member, wnid in zip(members, wnids, strict=True):
        found[wnid].append(member)
    return found


def validation_labels(devkit: Path) -> list[str]:
    """The class of each validation image, in the order of their names, as torchvision's parse_devkit_archive finds it.

    The kit also numbers synsets that are not classes (classes have no children), and lists one number per line.
    """
    from scipy.io import loadmat  # only this data set needs it

    with tarfile.open(devkit, "r:gz") as archive:  # its MD5 says what is in it
        meta = loadmat(io.BytesIO(_content(archive, f"{KIT}/meta.mat")), squeeze_me=True)["synsets"]
        truth = _content(archive, f"{KIT}/ILSVRC2012_validation_ground_truth.txt").split()
    wnids = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in meta if s["num_children"] == 0}
    return [wnids[int(number)] for number in truth]


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, "the kit's MD5 says that this is a file"
    return file.read()
