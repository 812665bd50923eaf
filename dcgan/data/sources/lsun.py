"""LSUN (Yu et al. 2015, arXiv:1506.03365): scenes of ten categories, 256 pixels on the shorter side, without labels.

`data.category` says which; bedroom has 3,033,042 + 300 images. A category comes as two LMDBs of JPEG or WebP images in
zip files. The addresses are those of the authors' own download.py, the SHA-256 those of tensorflow/datasets'
url_checksums/lsun.txt.
"""

import logging
import os
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

from dcgan import storage
from dcgan.config import Data
from dcgan.data.decode import TRANSFORM
from dcgan.data.sources import lmdbs, published
from dcgan.data.sources.base import Opened
from dcgan.data.sources.lmdbs import FILE
from dcgan.data.sources.partial import locked
from dcgan.data.store import Description, SourceFile

log = logging.getLogger(__name__)

ADDRESSES = ("http://dl.yf.io/lsun/scenes",)
SPLITS = {"train": "train", "test": "val"}  # as stored, and as published; the published test set is of all categories
CATEGORIES = {  # SHA-256 of <category>_train_lmdb.zip and <category>_val_lmdb.zip
    "bedroom": (
        "a15644c2e7153106867f0adb3491fc41224102d1f01b24494fb47d9f5d1f174e",
        "5d022e781b241c25ec2e1f1f769afcdb8091d7fd58362667aec03137b8114b12",
    ),
    "bridge": (
        "2701b2d421bbc4d8a5e9b0652ff7c3b57cd6495da8e0e85c39533275b5a925a3",
        "83216a2974d6068c2e1d18086006e7380ff58540216f955ce87fe049b460cb0d",
    ),
    "church_outdoor": (
        "91128ae026840ac0c5982b4445ab5fc4e092d6847cca76793b2b1a0815c2e74a",
        "34635b7547a3e51a15f942a4a4082dd6bc9cca381a953515cb2275c0eed50584",
    ),
    "classroom": (
        "73a8a3e318819e1cc602f229673c3f51a68f3ece61e3764ce22df6abea4d0873",
        "5e0e9a375d94091dfe1fa3be87d4a92f41c03f1c0b8e376acc7e05651de512d7",
    ),
    "conference_room": (
        "fa0a4cf72e7acfb103392eaf33640d5508a728e971f31877b01d64e1bde6068c",
        "927c94df52e10b9b374748c2b83b28b5860e946b3186dfd587985e274834650f",
    ),
    "dining_room": (
        "e4ee24c7c309360c3bf019123ce5bbf17434b2ba33abec2b0b07cfae715a52cb",
        "bd604d4b91bb5a9611d4e0b85475efd20758390d1a4eb57b53973fcbb5aa8ab6",
    ),
    "kitchen": (
        "b1993cf639aece5d207a27eb9ff872bcca9dff6472d8227a052c79d40ee753c4",
        "329165f35ec61c4cf49f809246de300b8baad3ffcbda1ac30c27bdd32c84369a",
    ),
    "living_room": (
        "bd2c52b812c80f73ce3062a221396d13a52b5cce2f813b4cdf61937651281d7a",
        "30a23d9a3db5414e9c97865f60ffb2ee973bfa658a23dbca7188ea514c97c9fc",
    ),
    "restaurant": (
        "11a0a924b960cd0900e9b7477d684fb338bd99cc5f72db1caac592e4f497e09a",
        "efaa7bcb898ad6cb73b07b89fec3a9c670f4622912eea22fab3986c2cf9a1c20",
    ),
    "tower": (
        "440caec74c9641cb51fd235a5970c8e4931c3af875aeb044a8bcca956e106309",
        "7f5257847bc01f4e40d4a1b3e24dd8fcd37063f12ca8cf31e726c2ee0b1ae104",
    ),
}


def signature(data: Data) -> Any:
    """Per split, the published SHA-256, or the length and modification time of an LMDB; see `base.Source`."""
    seen: dict[str, Any] = {}
    for split, (name, digest) in _parts(data).items():
        seen[split] = digest
        if data.source and not published.is_address(data.source) and (found := _find(data.source, name)).name == FILE:
            status = found.stat()
            seen[split] = [status.st_size, status.st_mtime_ns]
    return seen


def read(data: Data, downloads: Path) -> Opened:
    """The published splits, three channels, no labels; in the LMDBs' order; see `base.Source`.

    data.source: a directory of `<category>_train_lmdb/` and `<category>_val_lmdb/` or of their zip files; or a mirror
    of these. A zip file is unpacked under `downloads`, once. Raises OSError if it does not fit there.
    """
    files = {split: _file(data, name, digest, downloads / "lsun") for split, (name, digest) in _parts(data).items()}
    splits = {split: lmdbs.images(file) for split, file in files.items()}
    return Opened(
        Description(data.name, (), data.size, 3, f"RGB; {TRANSFORM}"),
        splits,
        tuple(_describe(file) for file in files.values()),
    )


def _parts(data: Data) -> dict[str, tuple[str, str]]:
    """Per split, the name of its LMDB and the SHA-256 of the zip file."""
    if data.category not in CATEGORIES:
        raise ValueError(f"unknown data.category={data.category!r}; categories are {', '.join(CATEGORIES)}")
    pairs = zip(SPLITS.items(), CATEGORIES[data.category], strict=True)
    return {split: (f"{data.category}_{theirs}_lmdb", digest) for (split, theirs), digest in pairs}


def _find(source: str, name: str) -> Path:
    return published.find(source, [f"{name}/{FILE}", f"{name}.zip"])


def _file(data: Data, name: str, digest: str, downloads: Path) -> Path:
    """The LMDB's file: where it was found, or unpacked under `downloads` from a zip file with the published hash."""
    found = None
    if data.source and not published.is_address(data.source):
        found = _find(data.source, name)
        if found.name == FILE:
            return found
    unpacked = downloads / name / FILE
    if unpacked.exists():
        return unpacked
    unpacked.parent.mkdir(parents=True, exist_ok=True)
    with locked(downloads / f".{name}.lock"):  # for another size it would be unpacked at once, 40 GB beside each other
        if not unpacked.exists():
            if found:
                archive = published.check(found, digest)
            else:
                archive = published.fetch(ADDRESSES, f"{name}.zip", digest, downloads, data)
            _unpack(archive, f"{name}/{FILE}", unpacked)
    return unpacked


def _unpack(archive: Path, member: str, target: Path) -> None:
    """Unpack one file of a zip file, by its exact name, completely or not at all: its CRC is checked on the way."""
    try:
        with zipfile.ZipFile(archive) as packed, storage.staging(target.parent) as staged:
            size, free = packed.getinfo(member).file_size, shutil.disk_usage(staged).free
            if size > free:
                raise OSError(f"{target} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
            log.info("unpacking %s: %.1f GB", archive, size / 1e9)
            with packed.open(member) as content, (staged / target.name).open("wb") as file:
                shutil.copyfileobj(content, file, 2**22)
                file.flush()
                os.fsync(file.fileno())
            os.replace(staged / target.name, target)
    except (KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise storage.CorruptError(f"{archive} has no sound {member}: {error}") from error


def _describe(file: Path) -> SourceFile:
    """The same whether the LMDB was found or unpacked."""
    log.info("hashing %s: %.1f GB", file, file.stat().st_size / 1e9)
    return SourceFile(f"{file.parent.name}/{FILE}", file.stat().st_size, storage.sha256(file))
