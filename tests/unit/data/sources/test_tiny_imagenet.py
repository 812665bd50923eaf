"""Tiny ImageNet, smaller: the zip file, read in place, and its tree give what torchvision's loader gives."""

import hashlib
import os
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from dcgan import storage
from dcgan.config import Data
from dcgan.data import sources
from dcgan.data.ingest import ingest
from dcgan.data.sources import archives, tiny_imagenet
from dcgan.data.store import Store

WNIDS = {"n03000001": "bathroom", "n02000002": "bedroom", "n04000003": "kitchen"}
VALIDATION = "0210122"  # the class of each validation image


def given(source: object) -> Data:
    return Data(name="tiny_imagenet", size=64, source=str(source))


@pytest.fixture
def tree(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the zip file unpacks to, with three classes of real rooms."""
    monkeypatch.setattr(tiny_imagenet, "CLASSES", 3)
    monkeypatch.setattr(tiny_imagenet, "COUNTS", {"train": 15, "test": 7})
    root = tmp_path / "data" / tiny_imagenet.FOLDER
    rooms = {wnid: iter(sorted((real_data / "rooms" / room).iterdir())) for wnid, room in WNIDS.items()}
    for wnid in WNIDS:
        (root / "train" / wnid / "images").mkdir(parents=True)
        for i in range(5):
            shutil.copy(next(rooms[wnid]), root / "train" / wnid / "images" / f"{wnid}_{7 * i}.JPEG")
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("boxes")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for i, number in enumerate(VALIDATION):
        wnid = list(WNIDS)[int(number)]
        shutil.copy(next(rooms[wnid]), root / "val" / "images" / f"val_{i}.JPEG")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in WNIDS))
    (root / "test" / "images").mkdir(parents=True)
    shutil.copy(next(rooms[wnid]), root / "test" / "images" / "test_0.JPEG")
    return root


@pytest.fixture
def archive(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The zip file, half of it stored and half deflated, declared to be the published one."""
    path = tmp_path / "mirror" / tiny_imagenet.ARCHIVE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as packed:
        for i, file in enumerate(sorted(tree.rglob("*"))):
            name = f"{tiny_imagenet.FOLDER}/{file.relative_to(tree).as_posix()}"
            packed.write(file, name, zipfile.ZIP_DEFLATED if i % 2 else zipfile.ZIP_STORED)
    monkeypatch.setattr(tiny_imagenet, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def content(source: Path, downloads: Path) -> dict[str, list[tuple[str, bytes, int]]]:
    splits = tiny_imagenet.read(given(source), downloads).splits
    return {split: [item[:3] for item in records] for split, records in splits.items()}


def test_images_are_torchvisions_pixel_for_pixel(
    tree: Path, archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sources.SOURCES, "tiny_imagenet", tiny_imagenet)
    store = Store.open(tmp_path, ingest(given(archive.parent), tmp_path), verify=True)
    read = v2.Compose([v2.Resize(64), v2.PILToTensor()])
    images = ImageFolder(str(tree / "train"), read)
    assert store.classes == tuple(images.classes) == tuple(sorted(WNIDS))
    assert store.labels("train").tolist() == images.targets
    assert (store.scored, store.clustered) == (("train", "test"), ("train",))
    for image, (expected, _) in zip(store.images("train"), images, strict=True):
        np.testing.assert_array_equal(image, expected.numpy())
    assert [store.classes[label] for label in store.labels("test")] == [list(WNIDS)[int(n)] for n in VALIDATION]
    validation = ImageFolder(str(tree / "val"), read)  # one class, its images in the order of their names
    for image, (expected, _) in zip(store.images("test"), validation, strict=True):
        np.testing.assert_array_equal(image, expected.numpy())


def test_zip_file_tree_and_mirror_give_the_same(tree: Path, archive: Path, tmp_path: Path, serve: Callable) -> None:
    expected = content(archive.parent, tmp_path / "downloads")
    assert os.listdir(archive.parent) == [archive.name]
    assert not (tmp_path / "downloads").exists(), "nothing is unpacked"
    for source in (tree, tree.parent):
        assert content(source, tmp_path) == expected
    assert (
        tiny_imagenet.read(given(tree), tmp_path).sources == tiny_imagenet.read(given(archive.parent), tmp_path).sources
    )
    address, asked = serve(lambda name, _: (200, raw := (archive.parent / name).read_bytes(), len(raw)))
    assert content(address, tmp_path / "downloads") == expected
    assert asked == [archive.name]


def test_an_image_is_found_behind_its_own_header(tmp_path: Path) -> None:
    """The extra field before a member's bytes may be longer than the directory's copy of it."""
    with zipfile.ZipFile(path := tmp_path / "a.zip", "w") as packed:
        info = zipfile.ZipInfo("a.JPEG")
        info.extra = struct.pack("<HH4s", 0x7777, 4, b"more")
        packed.writestr(info, b"content")
        info.extra = b""
    (member,) = archives.in_zip(path)
    assert path.read_bytes()[member.offset : member.offset + member.length] == b"content"


@pytest.mark.parametrize("how", ["outside", "encrypted", "method", "header", "directory"])
def test_a_zip_file_that_is_not_read_in_place_is_refused_by_name(tmp_path: Path, how: str) -> None:
    with zipfile.ZipFile(path := tmp_path / "a.zip", "w") as packed:
        name = "../b.JPEG" if how == "outside" else "b.JPEG"
        packed.writestr(name, b"content", zipfile.ZIP_BZIP2 if how == "method" else zipfile.ZIP_STORED)
    raw = bytearray(path.read_bytes())
    if how == "encrypted":
        raw[raw.index(b"PK\1\2") + 8] |= 1
    if how == "header":
        raw[:4] = b"gone"
    if how == "directory":
        del raw[-10:]
    path.write_bytes(raw)
    reason = {
        "outside": r"a\.zip: the name \.\./b\.JPEG leads out of the archive",
        "encrypted": r"a\.zip: b\.JPEG is encrypted",
        "method": r"a\.zip: b\.JPEG is encrypted, or compressed by method 12",
        "header": r"a\.zip: b\.JPEG has no header at byte 0",
        "directory": r"a\.zip is damaged or cut short: File is not a zip file",
    }
    with pytest.raises(storage.CorruptError, match=reason[how]):
        archives.in_zip(path)


def test_a_zip_file_that_is_not_the_published_one_is_refused(archive: Path, tmp_path: Path) -> None:
    with archive.open("ab") as file:
        file.write(b"\0")
    with pytest.raises(storage.CorruptError, match=r"tiny-imagenet-200\.zip .* is not the published file"):
        tiny_imagenet.read(given(archive.parent), tmp_path)


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("train/n02000002/images/n02000002_7.JPEG", "has 14 images in split train; published are 15"),
        ("val/images/val_3.JPEG", r"val_annotations\.txt has val_3\.JPEG of class 'n03000001'; one of the two is not"),
        ("val/val_annotations.txt", r"has no val/val_annotations\.txt"),
    ],
)
def test_an_incomplete_tree_is_refused(tree: Path, tmp_path: Path, gone: str, reason: str) -> None:
    (tree / gone).unlink()
    with pytest.raises(ValueError, match=reason):
        tiny_imagenet.read(given(tree), tmp_path)


def test_annotations_and_classes_that_do_not_fit_are_refused(tree: Path, tmp_path: Path) -> None:
    with (tree / "val" / "val_annotations.txt").open("a") as file:
        file.write("half a line")
    with pytest.raises(ValueError, match=r"val_annotations\.txt has half a line of class ''"):
        tiny_imagenet.read(given(tree), tmp_path)
    (tree / "wnids.txt").write_text("n02000002\n")
    with pytest.raises(ValueError, match=r"wnids\.txt has 1 classes; Tiny ImageNet has 3"):
        tiny_imagenet.read(given(tree), tmp_path)


def test_a_directory_without_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has none of wnids\.txt, .*tiny-imagenet-200\.zip"):
        tiny_imagenet.signature(given(tmp_path))


def test_the_signature_follows_the_files_that_are_used(tree: Path, archive: Path) -> None:
    seen = [tiny_imagenet.signature(given(tree))]
    (tree / "test" / "images" / "test_0.JPEG").unlink()
    assert tiny_imagenet.signature(given(tree)) == seen[0]
    os.utime(tree / "val" / "val_annotations.txt", ns=(0, 0))
    seen.append(tiny_imagenet.signature(given(tree)))
    (tree / "train" / "n02000002" / "images" / "n02000002_7.JPEG").unlink()
    seen.append(tiny_imagenet.signature(given(tree)))
    assert len(set(seen)) == 3
    assert tiny_imagenet.signature(given(archive.parent)) == tiny_imagenet.ARCHIVE_MD5
    assert tiny_imagenet.signature(Data(name="tiny_imagenet", size=64)) == tiny_imagenet.ARCHIVE_MD5
