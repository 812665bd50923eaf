"""STL-10 is torchvision's pixel for pixel; of an archive five members are written and nothing else."""

import hashlib
import io
import json
import os
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from dcgan import storage
from dcgan.config import Data
from dcgan.data.ingest import ingest
from dcgan.data.records import Pixels
from dcgan.data.sources import SOURCES, stl10
from dcgan.data.store import Store

COUNTS = {"unlabeled": 50, "train": 20, "test": 30}


def given(source: object, size: int = 64) -> Data:
    return Data(name="stl10", size=size, source=str(source))  # type: ignore[arg-type]


@pytest.fixture
def files(real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of small .bin files of real 96 px photographs, declared to be the published ones."""
    paths = iter(sorted((real_data / "rooms").rglob("*.jpg"))[::10])
    folder = tmp_path / "files" / stl10.FOLDER
    folder.mkdir(parents=True)
    for split, count in COUNTS.items():
        images = np.stack([np.asarray(Image.open(next(paths)).convert("RGB")) for _ in range(count)])
        images.transpose(0, 3, 2, 1).tofile(folder / f"{split}_X.bin")  # a channel at a time, column by column
        if split != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")
    md5 = {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in stl10.FILES}
    theirs = torchvision.datasets.STL10
    for names in ("train_list", "test_list"):
        monkeypatch.setattr(theirs, names, [[name, md5[name]] for name, _ in getattr(theirs, names)])
    monkeypatch.setattr(stl10, "FILES", md5)
    monkeypatch.setitem(SOURCES, "stl10", stl10)
    return folder


@pytest.fixture
def archive(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return pack(tmp_path / "mirror", monkeypatch, lambda packed: packed.add(files, stl10.FOLDER))


def pack(folder: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[tarfile.TarFile], None]) -> Path:
    """An archive of our own, declared to be the published one."""
    folder.mkdir(exist_ok=True)
    path = folder / stl10.ARCHIVE
    with tarfile.open(path, "w:gz", compresslevel=1) as packed:
        fill(packed)
    monkeypatch.setattr(stl10, "ARCHIVE_MD5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


def test_address_and_checksums_are_torchvisions() -> None:
    theirs = torchvision.datasets.STL10
    assert dict([*theirs.train_list, *theirs.test_list]) == stl10.FILES
    assert f"{stl10.ADDRESSES[0]}/{stl10.ARCHIVE}" == theirs.url
    assert (theirs.tgz_md5, theirs.base_folder) == (stl10.ARCHIVE_MD5, stl10.FOLDER)


def test_images_and_labels_are_torchvisions(files: Path, tmp_path: Path) -> None:
    opened = stl10.read(given(files), tmp_path)
    assert list(opened.splits) == ["unlabelled", "train", "test"]
    for split, name in zip(opened.splits, COUNTS, strict=True):
        theirs = torchvision.datasets.STL10(str(files.parent), split=name)
        ours = list(opened.splits[split])
        np.testing.assert_array_equal(np.stack([item.image for item in ours]).transpose(0, 3, 1, 2), theirs.data)
        np.testing.assert_array_equal([item.label for item in ours], theirs.labels.astype(np.int8))
        assert isinstance(records := opened.splits[split], Pixels)
        assert isinstance(records.images, np.memmap), "not read into memory"


def test_a_store_has_images_with_and_without_labels(files: Path, tmp_path: Path) -> None:
    store = Store.open(tmp_path, ingest(given(files), tmp_path), verify=True)
    assert store.training == ("unlabelled",)
    assert (store.labels("unlabelled") == -1).all()
    assert store.labels("train").tolist() == [*range(10)] * 2
    assert {split: store.count(split) for split in store.splits} == {"unlabelled": 50, "train": 20, "test": 30}
    image = next(iter(torchvision.datasets.STL10(str(files.parent), split="test")))[0]
    small = np.asarray(image.resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(store.images("test")[0].transpose(1, 2, 0), small)


def test_an_archive_and_a_mirror_of_it_give_the_same(
    files: Path, archive: Path, tmp_path: Path, serve: Callable
) -> None:
    address, asked = serve(lambda name, _: (200, raw := (archive.parent / name).read_bytes(), len(raw)))
    expected = stl10.read(given(files), tmp_path).sources
    for number, source in enumerate((files.parent, archive.parent, address)):
        opened = stl10.read(given(source), tmp_path / f"downloads{number}")
        assert opened.sources == expected
        assert stl10.signature(given(source)) == json.loads(json.dumps(stl10.FILES))
    assert asked == [stl10.ARCHIVE]
    assert os.listdir(archive.parent) == [stl10.ARCHIVE], "nothing is unpacked beside the archive"


def test_what_was_unpacked_is_used_again_and_replaced_if_it_went_bad(archive: Path, tmp_path: Path) -> None:
    data, downloads = given(archive.parent), tmp_path / "downloads"
    first = stl10.read(data, downloads).sources
    kept = downloads / "stl10" / stl10.FOLDER / "test_y.bin"
    before = kept.stat().st_mtime_ns
    assert stl10.read(data, downloads).sources == first
    assert kept.stat().st_mtime_ns == before, "unpacked once"
    kept.write_bytes(b"?")
    assert stl10.read(data, downloads).sources == first


def test_ingestions_at_two_sizes_unpack_once(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpack, unpacked = stl10._unpack, []
    both = threading.Barrier(2)

    def counted(*arguments: Any) -> Path:
        unpacked.append(arguments)
        time.sleep(0.2)  # for the other to come as far
        return unpack(*arguments)

    def read(size: int) -> tuple[Any, ...]:
        both.wait()
        return stl10.read(given(archive.parent, size), tmp_path / "downloads").sources

    monkeypatch.setattr(stl10, "_unpack", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(read, (32, 64))
    assert first == second
    assert len(unpacked) == 1


def test_other_members_are_not_written(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(packed: tarfile.TarFile) -> None:
        for name in ("../outside", "/absolute", f"{stl10.FOLDER}/../../train_X.bin", f"{stl10.FOLDER}/class_names.txt"):
            packed.addfile(tarfile.TarInfo(name), io.BytesIO())
        packed.add(files, stl10.FOLDER)

    archive = pack(tmp_path / "mine", monkeypatch, fill)
    stl10.read(given(archive.parent), tmp_path / "downloads")
    written = [path.name for path in (tmp_path / "downloads").rglob("[!.]*")]
    assert sorted(written) == sorted(["stl10", stl10.FOLDER, *stl10.FILES])
    assert not (tmp_path / "outside").exists()


def test_a_link_in_place_of_a_file_is_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(packed: tarfile.TarFile) -> None:
        link = tarfile.TarInfo(f"{stl10.FOLDER}/test_y.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        packed.addfile(link)

    archive = pack(tmp_path / "mine", monkeypatch, fill)
    with pytest.raises(storage.CorruptError, match=r"stl10_binary/test_y\.bin is not a regular file"):
        stl10.read(given(archive.parent), tmp_path / "downloads")


def test_an_archive_without_a_file_is_refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (files / "test_y.bin").unlink()
    archive = pack(tmp_path / "mine", monkeypatch, lambda packed: packed.add(files, stl10.FOLDER))
    with pytest.raises(storage.CorruptError, match=r"stl10_binary\.tar\.gz lacks stl10_binary/test_y\.bin"):
        stl10.read(given(archive.parent), tmp_path / "downloads")
    assert not list((tmp_path / "downloads" / "stl10").glob("[!.]*"))


def test_a_truncated_archive_is_refused_and_not_unpacked(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(storage.CorruptError, match=r"stl10_binary\.tar\.gz .* is not the published file"):
        stl10.read(given(archive.parent), tmp_path / "downloads")
    assert not (tmp_path / "downloads").exists()


def test_a_file_that_is_not_the_published_one_is_refused(files: Path, tmp_path: Path) -> None:
    with (files / "train_X.bin").open("ab") as file:
        file.write(b"?")
    with pytest.raises(storage.CorruptError, match=r"train_X\.bin \(\d+ bytes\) is not the published file"):
        stl10.read(given(files), tmp_path)


def test_a_directory_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"data\.source={tmp_path} has none of stl10_binary/train_X\.bin, "):
        stl10.signature(given(tmp_path))
